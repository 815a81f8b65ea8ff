"""Run by `make wheel-check` with the wheel's own environment: imports and trains without the repository."""

from importlib.resources import files

import torch

import lasnn_sj
from lasnn_sj import DirectEncoder, LaSNNTrainer, models

assert "site-packages" in lasnn_sj.__file__, f"imported from {lasnn_sj.__file__}, not from the wheel"
assert files(lasnn_sj).joinpath("py.typed").is_file(), "type checkers need py.typed in the wheel"

student = models.conv3_linear2(num_classes=4, in_channels=1, image_size=8, width=0.1)
teacher = models.teacher_resnet20(num_classes=4, in_channels=1, width=0.25)
batches = [(torch.rand(8, 1, 8, 8) * 2 - 1, torch.randint(4, (8,)))]
history = LaSNNTrainer(student, teacher, encoder=DirectEncoder(T=4)).fit(batches, epochs=1)
assert history[0]["attention"] > 0
print(f"lasnn_sj {lasnn_sj.__version__} from its wheel trains: {history[0]}")
