"""Losses and gradients that are not finite: their source, and the files kept of the step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from ..models.readout import BatchError
from ..runtime import files
from .checkpoint import unshared

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
