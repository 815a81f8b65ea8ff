"""Class scores from a network's output."""

from __future__ import annotations

from torch import Tensor, nn

from ..neurons import IntegratorNode


class BatchError(ValueError):
    """A batch, or the student's output for it, cannot be used; the message names the cause."""


def resolve_readout(model: nn.Module, readout: str) -> str:
    """Return ``"last"`` or ``"mean"``; ``"auto"`` is ``"last"`` for networks with an integrating output."""
    if readout != "auto":
        return readout
    return "last" if any(isinstance(m, IntegratorNode) for m in model.modules()) else "mean"


def class_scores(outputs: Tensor, batch: int, readout: str) -> Tensor:
    """Return the class scores ``[N, K]`` (float32) of a student's output ``[T, N, K]`` or ``[N, K]``.

    Args:
        outputs: the student's output.
        batch: number of samples ``N``.
        readout: ``"last"`` takes the last step, anything else the mean over time.

    Raises:
        BatchError: any other shape.
    """
    if isinstance(outputs, Tensor):
        if outputs.dim() == 2 and outputs.shape[0] == batch:
            return outputs.float()
        if outputs.dim() == 3 and outputs.shape[1] == batch:
            return (outputs[-1] if readout == "last" else outputs.mean(0)).float()
    got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise BatchError(
        f"the student must return class scores [N, K] or [T, N, K] with N = {batch}, got {got}; "
        f"is it in multi-step mode (functional.set_step_mode(net, 'm'))?"
    )
