"""Mixed precision, gradient clipping and the optimiser's step."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .nonfinite import NonFiniteError, last_gradient
from .options import DTYPES, TrainingOptions

log = logging.getLogger(__name__)


class MixedPrecision:
    """Autocast, gradient scaling of float16, gradient clipping, and the optimiser's step.

    Args:
        name: ``"float32"``, ``"tf32"``, ``"bfloat16"`` or ``"float16"``.
        device: where training runs.
        options: their ``clip_norm`` is read at each step.
    """

    def __init__(self, name: str, device: torch.device, options: TrainingOptions) -> None:
        self.dtype, self.device, self.options = DTYPES[name], device, options
        self.uses_tf32 = name == "tf32"
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")

    def autocast(self, wanted: bool = True) -> torch.autocast:
        """Context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=wanted and self.dtype is not None)

    @contextmanager
    def tf32(self) -> Iterator[None]:
        """Context of a whole step: with ``"tf32"`` it sets PyTorch's two flags, otherwise it leaves them."""
        flags = (torch.backends.cudnn, torch.backends.cuda.matmul) if self.uses_tf32 else ()
        before = [flag.allow_tf32 for flag in flags]
        try:
            for flag in flags:
                flag.allow_tf32 = True
            yield
        finally:
            for flag, value in zip(flags, before):
                flag.allow_tf32 = value

    def backward(self, loss: Tensor) -> None:
        """Add the loss' gradients to the parameters'."""
        self.scaler.scale(loss).backward()

    def update(self, optimizer: Optimizer, student: nn.Module) -> None:
        """Clip the gradients and run the optimizer step.

        float16's scale is found by trying: a gradient beyond its range halves the scale and leaves the
        weights alone.

        Raises:
            NonFiniteError: the gradient is not finite; the weights are as they were.
        """
        self.scaler.unscale_(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if math.isfinite(norm.item()):
            if self.options.clip_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.options.clip_norm, norm)
        elif not self.scaler.is_enabled() or self.scaler.get_scale() <= 1:
            layer = last_gradient(student)
            raise NonFiniteError(f"the gradient is not finite, first in {layer}", layer)
        self.scaler.step(optimizer)
        self.scaler.update()

    def skips_on_device(self, optimizer: Optimizer) -> bool:
        """Return whether :meth:`update_unless` works: float32 or bfloat16, and a fused optimizer."""
        return not self.scaler.is_enabled() and getattr(optimizer, "_step_supports_amp_scaling", False)

    def gradient_norms(self, optimizer: Optimizer) -> tuple[list[nn.Parameter], Tensor]:
        """Return the parameters that have a gradient, and its L2 norm for each (a tensor; not read)."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return parameters, torch.stack(torch._foreach_norm([p.grad for p in parameters]))

    def update_unless(
        self, skip: Tensor, optimizer: Optimizer, parameters: list[nn.Parameter], norms: Tensor
    ) -> None:
        """Clip and step on the device; weights and state are unchanged if ``skip`` is true.

        Args:
            skip: bool scalar on the device, which is not read.
            optimizer: a fused one.
            parameters, norms: of :meth:`gradient_norms`.
        """
        if self.options.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(
                parameters, self.options.clip_norm, torch.linalg.vector_norm(norms)
            )
        optimizer.grad_scale, optimizer.found_inf = None, skip.float()
        first = [p for p in parameters if p not in optimizer.state]
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
        for momentum in (optimizer.state[p].get("momentum_buffer") for p in first):
            if momentum is not None:  # SGD's, which a first step that is skipped leaves without values
                momentum.copy_(torch.where(skip, 0, momentum))


def add_missing(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Add parameters to the first group of an optimizer that does not train them yet.

    A new group would have no learning rate in a scheduler that was created before.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [p for p in parameters if id(p) not in known]
    if missing:
        optimizer.param_groups[0]["params"].extend(missing)
