"""Checks of a trainer's arguments; each error names the argument, what it was, and what would do."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..models.readout import BatchError
from .options import TrainingOptions

log = logging.getLogger(__name__)


def networks(student: object, teacher: object, encoder: object) -> None:
    """Raise :class:`ValueError` for what is no network, or one without values."""
    for name, given in (("student", student), ("teacher", teacher)):
        if given is None and name == "teacher":
            continue
        if isinstance(given, type):
            raise ValueError(f"{name} is the class {given.__name__}; give a network, {given.__name__}(...)")
        if not isinstance(given, nn.Module):
            what = f"the name {given!r}" if isinstance(given, str) else f"a {type(given).__name__}"
            raise ValueError(
                f"{name} must be a network (torch.nn.Module), got {what}; build one, for example with "
                f"lasnn_sj.models.create or timm.create_model"
            )
        for path, tensor in itertools.chain(given.named_parameters(), given.named_buffers()):
            if tensor.is_meta:
                raise ValueError(
                    f"{name} has no values: {path} is on the meta device; build it outside "
                    f"torch.device('meta') and load its weights"
                )
    if isinstance(encoder, type):
        raise ValueError(f"encoder is the class {encoder.__name__}; give encoder={encoder.__name__}(T)")
    if encoder is not None and not isinstance(encoder, nn.Module):
        raise ValueError(
            f"encoder must be a module such as DirectEncoder(T) or PoissonEncoder(T), got a "
            f"{type(encoder).__name__}; put a function into the forward of an nn.Module"
        )


def device(given: torch.device | str) -> torch.device:
    """A device that is there.

    Raises:
        ValueError: no name of a device, or CUDA where PyTorch sees none.
    """
    try:
        found = torch.device(given)
    except RuntimeError as error:
        raise ValueError(f"device must be such as cpu, cuda or cuda:1, got {given!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {found}, but PyTorch sees no CUDA device; give device='cpu'")
    return found


def run_dir(given: str | Path | None, options: TrainingOptions) -> Path | None:
    """A run folder's path; :class:`ValueError` where there is a file, or none and one is needed."""
    path = None if given is None else Path(given)
    if path is None and options.keep_best:
        raise ValueError("options.keep_best writes best.safetensors to the run folder; give a run_dir")
    if path is not None and path.exists() and not path.is_dir():
        raise ValueError(f"run_dir must be a folder, {path} is a file; give another name")
    return path


def loaders(
    train: Iterable,
    validation: Iterable | None,
    scheduler: LRScheduler | None,
    options: TrainingOptions,
) -> None:
    """Refuse loaders that cannot be trained with, before anything is done."""
    for name, loader in (("train_loader", train), ("val_loader", validation)):
        if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
            raise ValueError(
                f"{name} is a data set ({type(loader).__name__}), not a loader of batches; give "
                f"DataLoader(dataset, batch_size=...)"
            )
        if isinstance(loader, Iterator):
            raise ValueError(
                f"{name} is a {type(loader).__name__}, which can be gone through once; give a DataLoader or "
                f"a list of batches"
            )
        if loader is not None and not isinstance(loader, Iterable):
            raise ValueError(f"{name} must give batches, got {type(loader).__name__}; give a DataLoader")
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
    watching = [name for name in ("keep_best", "patience") if getattr(options, name)]
    if watching and validation is None:
        raise ValueError(
            f"options.{watching[0]} watches {options.monitor}; give fit a val_loader, or leave it out"
        )
    if validation is not None and _is_empty(validation):
        raise BatchError("val_loader is empty, the evaluation loader gave no batch; give None for none")


def time_axis(loader: Iterable, images: Tensor, encoder: nn.Module | None) -> None:
    """Raise :class:`BatchError` for event frames ``[N, T, ...]``, also where N = T hides it."""
    stacked = isinstance(loader, DataLoader) and loader.collate_fn is default_collate
    if stacked and encoder is None and images.dim() == 5:
        raise BatchError(
            f"the loader stacks event frames as [N, T, C, H, W], {tuple(images.shape)}, the student takes "
            f"[T, N, C, H, W]; give the DataLoader collate_fn=lasnn_sj.data.events.collate"
        )


def _is_empty(loader: Iterable) -> bool:
    try:
        return len(loader) == 0
    except TypeError:  # nobody knows
        return False


def teacher(teacher: nn.Module | None, objective: object) -> None:
    """Raise :class:`ValueError` where the objective lacks a teacher, or makes no use of the one given."""
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
    """Raise :class:`ValueError` where optimizer or scheduler would train nothing of the student."""
    own = {id(parameter) for parameter in student.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"optimizer has none of the student's parameters, so nothing would be trained; make it of "
            f"student.parameters() of this very {type(student).__name__}"
        )
    given = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(p.requires_grad for p in given):
        raise ValueError(
            "optimizer has only frozen parameters (requires_grad is False), so nothing would be trained; "
            "call student.requires_grad_(True), or unfreeze some layers"
        )
    if all(float(group.get("initial_lr", group["lr"])) == 0 for group in optimizer.param_groups):
        raise ValueError("optimizer has lr = 0, so nothing would be trained; give a learning rate above 0")
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError(
            f"scheduler ({type(scheduler).__name__}) belongs to another optimizer than the trainer's; give "
            f"the optimizer that it was made for, too"
        )
