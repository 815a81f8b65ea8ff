"""Checks of a trainer's arguments; each error names the argument, what it was, and what would do."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau


def loaders(train: Iterable, validation: Iterable | None, scheduler: LRScheduler | None) -> None:
    """Refuse loaders that cannot be trained with, before anything is done."""
    if isinstance(scheduler, ReduceLROnPlateau):
        if validation is None:
            raise ValueError(
                "scheduler is a ReduceLROnPlateau, which is stepped with the validation loss; give fit a "
                "val_loader, or another scheduler"
            )
        if scheduler.mode != "min":
            raise ValueError(
                f"scheduler is a ReduceLROnPlateau of mode {scheduler.mode!r}, but is stepped with the "
                f"validation loss; give mode='min'"
            )


def teacher(teacher: nn.Module | None, objective: object) -> None:
    if not callable(objective):
        raise ValueError(f"objective must be callable with signals, got {objective!r}")
    wanted = bool(getattr(objective, "needs_teacher", False))
    if wanted and teacher is None:
        raise ValueError(f"the objective {objective!r} needs a teacher; give one, or an objective without")
    if teacher is not None and not wanted:
        raise ValueError(
            f"the objective {objective!r} makes no use of the teacher; leave the teacher out, or add an "
            f"objective that uses it, such as Attention() or LabelKD()"
        )


def optimizer(student: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    own = {id(parameter) for parameter in student.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"optimizer has none of the student's parameters, so nothing would be trained; make it of "
            f"student.parameters() of this very {type(student).__name__}"
        )
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError(
            f"scheduler ({type(scheduler).__name__}) belongs to another optimizer than the trainer's; give "
            f"the optimizer that it was made for, too"
        )
