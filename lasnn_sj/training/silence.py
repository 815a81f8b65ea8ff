"""Layers that do not fire, by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from spikingjelly.activation_based import neuron
from torch import Tensor, nn

log = logging.getLogger(__name__)


@contextmanager
def watched(student: nn.Module) -> Iterator[dict[str, bool]]:
    """Record by name whether each spiking layer that was called gave a nonzero output."""
    fired: dict[str, bool] = {}

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, Tensor):
                fired[name] = fired.get(name, False) or bool(output.any())

        return hook

    hooks = [
        module.register_forward_hook(hook_of(name or "(itself)"))
        for name, module in student.named_modules()
        if isinstance(module, neuron.BaseNode)
    ]
    try:
        yield fired
    finally:
        for hook in hooks:
            hook.remove()


def silent(fired: dict[str, bool]) -> list[str]:
    """Return the layers whose outputs were all zero."""
    return [name for name, any_ in fired.items() if not any_]


def warn_of_silence(names: list[str], samples: int, student: nn.Module) -> None:
    """Warn about layers that do not fire, with a remedy."""
    shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    remedy = (
        "; lower v_threshold, or, after the first steps, train on: batch norm's running averages lag behind"
        if batch_norms(student)
        else " and these layers learn nothing; lower v_threshold, balance the thresholds of a converted ANN "
        "(lasnn_sj.conversion), or add batch norm"
    )
    log.warning("no spike on the first %d samples in %s: no signal passes%s", samples, shown, remedy)


def batch_norms(student: nn.Module) -> list[nn.Module]:
    """Return the layers that normalize over the batch."""
    return [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
