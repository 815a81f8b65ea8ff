"""Losses and gradients that are not finite: their source, and the files kept of the step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from ..models.readout import BatchError
from ..runtime import distributed, files
from .checkpoint import unshared

if TYPE_CHECKING:
    from .dataloader import Batch
    from .trainer import Trainer

log = logging.getLogger(__name__)


class NonFiniteError(BatchError):
    """The loss or a gradient is NaN or infinite; the student keeps its weights of the step before.

    Attributes:
        layer: first layer with such a value, if there is one.
    """

    def __init__(self, message: str, layer: str | None = None) -> None:
        super().__init__(message)
        self.layer = layer


@torch.no_grad()
def first_layer(student: nn.Module, x: Tensor) -> str | None:
    """Return the first layer, in the order of the forward pass, whose output is not finite."""
    found: list[str] = []

    def hook_of(name: str):
        def hook(module, args, output):
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                found.append(name)

        return hook

    if not bool(torch.isfinite(x).all()):
        return "the encoded input"
    hooks = [module.register_forward_hook(hook_of(name)) for name, module in student.named_modules() if name]
    functional.reset_net(student)
    try:
        student(x)
    except ValueError:  # neurons refuse such an input; the layer before is found by then
        pass
    finally:
        for hook in hooks:
            hook.remove()
        functional.reset_net(student)
    return found[0] if found else None


def last_gradient(student: nn.Module) -> str | None:
    """Return the parameter whose gradient was first not finite in the backward pass."""
    for name, parameter in reversed(list(student.named_parameters())):
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return name
    return None


def leave_out(
    trainer: Trainer, error: NonFiniteError, where: str, batch: Batch, images: Tensor, labels: Tensor
) -> None:
    """Skip a step that is not finite, or save it for inspection and raise its error."""
    shown = f"; its samples are {batch.indices[:16]}" if batch.indices else ""
    message, progress = f"{where}: {error}{shown}", trainer.progress
    if trainer.options.on_nonfinite == "skip":
        progress.epoch.skipped += 1
        log.warning("left out: %s", message)
        return
    if trainer.run_dir is not None:
        folder = trainer.run_dir / "nonfinite"
        if distributed.world_size() > 1:
            folder = folder / f"process{distributed.rank()}"
        at = {"step": progress.step + 1, "epoch": progress.epoch.number, "batch": batch.position}
        keep_for_inspection(folder, trainer.student, images, labels, error, at, batch.indices)
        message += f"; the step is kept in {folder}"
    raise NonFiniteError(message, error.layer) from error


def keep_for_inspection(
    folder: Path,
    student: nn.Module,
    images: Tensor,
    labels: Tensor,
    error: NonFiniteError,
    where: Mapping[str, object],
    indices: Sequence[int] | None,
) -> None:
    """Write the step that failed: ``student.safetensors``, ``batch.safetensors`` and ``what.json``.

    Failures to write, such as a full disk, are logged and do not hide the error.
    """
    weights = {name: unshared(tensor) for name, tensor in student.state_dict().items()}
    what = {
        "error": str(error),
        "layer": error.layer,
        **where,
        "indices": indices and list(map(int, indices)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / "student.safetensors", save(weights))
        batch = {"images": unshared(images), "labels": unshared(labels)}
        files.write(folder / "batch.safetensors", save(batch))
        files.write_json(folder / "what.json", what)
    except Exception as failure:  # safetensors raises errors of its own types
        log.warning("%s could not be written: %s", folder, failure)
