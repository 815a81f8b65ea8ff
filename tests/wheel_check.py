"""Run by `make wheel-check` with the wheel's own environment: imports and trains without the repository."""

from importlib import import_module
from importlib.resources import files

import torch

import lasnn_sj
from lasnn_sj import DirectEncoder, LaSNNTrainer, models

assert "site-packages" in lasnn_sj.__file__, f"imported from {lasnn_sj.__file__}, not from the wheel"
assert files(lasnn_sj).joinpath("py.typed").is_file(), "type checkers need py.typed in the wheel"

PUBLIC = {
    "lasnn_sj": "Callback DirectEncoder LaSNNTrainer PoissonEncoder models",
    "lasnn_sj.analysis": "energy inspect plots spike_statistics write_report",
    "lasnn_sj.conversion": "balance_thresholds calibrate convert export_nir prune_magnitude sparsity",
    "lasnn_sj.data": "load load_events",
    "lasnn_sj.distillation": "Attention CrossEntropy DefaultKD LabelKD SparseKD activation_map "
    "attention_loss default_kd gradient_map sparse_kd spike_activation_map",
    "lasnn_sj.experiments": "Pipeline Recipe",
    "lasnn_sj.models": "create from_pretrained list_models save_pretrained",
    "lasnn_sj.neurons": "IFNode IntegratorNode LIFNode LinearSurrogate accelerate backend",
    "lasnn_sj.training": "Callback LaSNNTrainer Trainer TrainingOptions accuracy_over_time evaluate",
}
for package, names in PUBLIC.items():
    module = import_module(package)
    missing = [name for name in {*names.split(), *module.__all__} if not hasattr(module, name)]
    assert not missing, f"{package} lacks {missing}"

student = models.conv3_linear2(num_classes=4, in_channels=1, image_size=8, width=0.1)
teacher = models.teacher_resnet20(num_classes=4, in_channels=1, width=0.25)
batches = [(torch.rand(8, 1, 8, 8) * 2 - 1, torch.randint(4, (8,)))]
history = LaSNNTrainer(student, teacher, encoder=DirectEncoder(T=4)).fit(batches, epochs=1)
assert history[0]["attention"] > 0
print(f"lasnn_sj {lasnn_sj.__version__} from its wheel trains: {history[0]}")
