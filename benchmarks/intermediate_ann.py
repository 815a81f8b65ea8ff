"""Train an intermediate ANN on CIFAR-10 and save its weights for stage 3.

    python benchmarks/intermediate_ann.py --source cifar10.npz --network conv3_linear2 --width 1.0

Of the 50,000 training images 45,000 train; the other 5,000, the same number of each class, are the validation
images that ``ImageData.split(5000, seed=0)`` holds out, so that no choice made later on them is biased by
this network. SGD with momentum and a one-cycle learning rate, random crops and flips, images in [-1, 1].
Writes ``NETWORK_wWIDTH.safetensors`` and a JSON file that says how it was made, into ``--out``.
"""

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file

from lasnn_sj import models
from lasnn_sj.data import stratified_split


@dataclass(frozen=True)
class Run:
    """Settings.

    Attributes:
        source: ``.npz`` file with ``x_train, y_train, x_test, y_test``.
        network: name of a network in :mod:`lasnn_sj.models`.
        width: factor of its channels.
        epochs: passes over the training images.
        lr: peak learning rate.
        batch: images of a step.
        weight_decay: of SGD.
        dropout: dropout probability.
        seed: of weights, order, augmentation and dropout.
        bfloat16: run convolutions and linear layers in bfloat16 (half the time on processors that have it).
        threads: of PyTorch.
        out: folder of the results.
    """

    source: Path
    network: str = "conv3_linear2"
    width: float = 1.0
    epochs: int = 20
    lr: float = 0.05
    batch: int = 128
    weight_decay: float = 5e-4
    dropout: float = 0.2
    seed: int = 0
    bfloat16: bool = True
    threads: int = 1
    out: Path = Path("benchmarks/weights")


def augmented(images: torch.Tensor) -> torch.Tensor:
    """Random crops after padding by 4 pixels, and flips, of uint8 images [N, C, H, W]."""
    n, _, h, w = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    rows = torch.randint(0, 9, (n, 1)) + torch.arange(h)
    columns = torch.randint(0, 9, (n, 1)) + torch.arange(w)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def signed(images: torch.Tensor) -> torch.Tensor:
    """uint8 to [-1, 1]."""
    return images.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def accuracy(net: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in percent."""
    net.eval()
    pieces = zip(images.split(500), labels.split(500))
    return 100 * sum(int((net(signed(x)).argmax(1) == y).sum()) for x, y in pieces) / len(labels)


def main(run: Run) -> None:
    """Train, print a line an epoch, save."""
    torch.set_num_threads(run.threads)
    torch.manual_seed(run.seed)
    file = np.load(run.source)
    images = torch.from_numpy(file["x_train"]).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(file["y_train"].reshape(-1).astype(np.int64))
    train, held = stratified_split(labels, 5000, seed=0)
    net = getattr(models, run.network)(10, width=run.width, spiking=False, dropout=run.dropout)
    net.to(memory_format=torch.channels_last)
    steps = len(train) // run.batch
    optimizer = torch.optim.SGD(net.parameters(), run.lr, momentum=0.9, weight_decay=run.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, run.lr, total_steps=steps * run.epochs, pct_start=0.2
    )
    begun = time.perf_counter()
    for epoch in range(1, run.epochs + 1):
        net.train()
        order, total = train[torch.randperm(len(train))], 0.0
        for step in range(steps):
            chosen = order[step * run.batch : (step + 1) * run.batch]
            with torch.autocast("cpu", torch.bfloat16, enabled=run.bfloat16):
                logits = net(signed(augmented(images[chosen])))
            loss = F.cross_entropy(logits.float(), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        top1 = accuracy(net, images[held], labels[held])
        seconds = time.perf_counter() - begun
        print(
            f"epoch {epoch}  loss {total / steps:.4f}  validation {top1:.2f} %  {seconds:.0f} s", flush=True
        )
    test = torch.from_numpy(file["x_test"]).permute(0, 3, 1, 2)
    test_labels = torch.from_numpy(file["y_test"].reshape(-1).astype(np.int64))
    run.out.mkdir(parents=True, exist_ok=True)
    path = run.out / f"{run.network}_w{run.width:g}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, path)
    made = {
        k: str(v) if isinstance(v, Path) else v for k, v in asdict(run).items() if k not in ("source", "out")
    }
    made |= {
        "command": "python benchmarks/intermediate_ann.py", "data": "CIFAR-10, 45,000 training images",
        "validation_top1": top1, "test_top1": accuracy(net, test, test_labels), "seconds": round(seconds),
        "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
    print(path, f"test {made['test_top1']:.2f} %")


if __name__ == "__main__":
    main(tyro.cli(Run))
