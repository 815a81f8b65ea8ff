"""Deferred checks of tensors, so that the host does not wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A plain variable, not a ContextVar, which torch.compile cannot trace.
_collecting: LateChecks | None = None


def require(
    condition: Tensor, error: Callable[..., Exception], *tensors: Tensor, skippable: bool = False
) -> None:
    """Raise ``error(*tensors)`` unless every element of ``condition`` is true.

    Within :class:`LateChecks` a condition on an accelerator is recorded instead of read.

    Args:
        condition: bool, any shape.
        error: makes the exception; may read the tensors, and is only called if the condition does not hold.
        tensors: arguments of ``error``. Of tensors that a replayed step overwrites, only these are copied.
        skippable: whether training may go on with the next batch; for :class:`LateChecks`.
    """
    if _collecting is not None and (condition.device.type != "cpu" or _collecting.on_cpu):
        _collecting.add(condition, error, tensors, skippable)
    elif not bool(condition.all()):
        raise error(*tensors)


class LateChecks:
    """Collect the conditions of :func:`require` in a ``with`` block; it may be entered several times.

    Args:
        on_cpu: collect conditions of CPU tensors too, which are otherwise read at once, as reading is free.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        self.on_cpu = on_cpu
        self._failed: list[Tensor] = []
        self._errors: list[Callable[..., Exception]] = []
        self._tensors: list[tuple[Tensor, ...]] = []
        self._skippable: list[bool] = []
        self._outer: list[LateChecks | None] = []

    def __enter__(self) -> LateChecks:
        global _collecting
        self._outer.append(_collecting)
        _collecting = self
        return self

    def __exit__(self, *_: object) -> None:
        global _collecting
        _collecting = self._outer.pop()

    def add(
        self, condition: Tensor, error: Callable[..., Exception], tensors: tuple[Tensor, ...], skippable: bool
    ) -> None:
        """Record a condition."""
        self._failed.append(~condition.all())
        self._errors.append(error)
        self._tensors.append(tensors)
        self._skippable.append(skippable)

    def add_copies(self, other: LateChecks) -> None:
        """Record the conditions of another object as they are now, with copies of their tensors."""
        self._failed += other.failed().unbind()
        self._errors += other._errors
        self._tensors += [tuple(tensor.clone() for tensor in each) for each in other._tensors]
        self._skippable += other._skippable

    def __len__(self) -> int:
        """Return the number of conditions."""
        return len(self._failed)

    def failed(self) -> Tensor:
        """Return which conditions fail, bool ``[number of conditions]``, without waiting for the device."""
        return torch.stack(self._failed)

    def fatal(self) -> Tensor:
        """Return whether a condition fails that cannot be skipped, a bool scalar, without waiting."""
        fatal = [failed for failed, skippable in zip(self._failed, self._skippable) if not skippable]
        return torch.stack(fatal).any() if fatal else torch.zeros_like(self._failed[0])

    def error(self, failed: list[bool]) -> Exception | None:
        """Return the exception of the first failing condition, given the result of :meth:`failed`."""
        for number, one in enumerate(failed):
            if one:
                return self._errors[number](*self._tensors[number])
        return None
