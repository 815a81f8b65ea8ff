"""Checks of a trainer's arguments; each error names the argument, its value and a remedy."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from pathlib import Path

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ..models.readout import BatchError
from . import graph
from .fingerprint import sentence
from .options import TrainingOptions

log = logging.getLogger(__name__)

BRIGHTEST = 32.0  # of images that an encoder takes; normalised ones end at about 3


def networks(student: object, teacher: object, encoder: object) -> None:
    """Raise :class:`ValueError` for an object that is not a network, or a network without values."""
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
    if student is teacher:
        raise ValueError(
            "teacher and student are one network, and a teacher is frozen; give a copy, "
            "teacher=copy.deepcopy(student)"
        )
    if isinstance(encoder, type):
        raise ValueError(f"encoder is the class {encoder.__name__}; give encoder={encoder.__name__}(T)")
    if encoder is not None and not isinstance(encoder, nn.Module):
        raise ValueError(
            f"encoder must be a module such as DirectEncoder(T) or PoissonEncoder(T), got a "
            f"{type(encoder).__name__}; put a function into the forward of an nn.Module"
        )


def device(given: torch.device | str) -> torch.device:
    """Return the device, after checking that it exists.

    Raises:
        ValueError: not the name of a device, or CUDA if PyTorch finds no CUDA device.
    """
    try:
        found = torch.device(given)
    except RuntimeError as error:
        raise ValueError(f"device must be such as cpu, cuda or cuda:1, got {given!r}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {found}, but PyTorch sees no CUDA device; give device='cpu'")
    return found


def run_dir(given: str | Path | None, options: TrainingOptions) -> Path | None:
    """Return the path of the run folder; raise :class:`ValueError` if it is a file, or missing but needed."""
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
    """Refuse loaders that cannot be used, before training starts."""
    for name, loader in (("train_loader", train), ("val_loader", validation)):
        no_data_set(name, loader)
        if isinstance(loader, Iterator):
            raise ValueError(
                f"{name} is a {type(loader).__name__}, which can be iterated over only once; give a "
                f"DataLoader or a list of batches"
            )
        if not isinstance(loader, Iterable) and (loader is not None or name == "train_loader"):
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
    if options.compile == "graph":
        graph.check_batches(train)
    if validation is not None and _is_empty(validation):
        raise BatchError("val_loader is empty, the evaluation loader gave no batch; give None for none")


def no_data_set(name: str, loader: object) -> None:
    """Raise :class:`ValueError` for a data set in place of a loader."""
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise ValueError(
            f"{name} is a data set ({type(loader).__name__}), not a loader of batches; give "
            f"DataLoader(dataset, batch_size=...)"
        )


def time_axis(loader: Iterable, images: Tensor, encoder: nn.Module | None) -> None:
    """Raise :class:`BatchError` for event frames ``[N, T, ...]``, also if N = T."""
    stacked = isinstance(loader, DataLoader) and loader.collate_fn is default_collate
    if stacked and encoder is None and images.dim() == 5:
        raise BatchError(
            f"the loader stacks event frames as [N, T, C, H, W], {tuple(images.shape)}, the student takes "
            f"[T, N, C, H, W]; give the DataLoader collate_fn=lasnn_sj.data.events.collate"
        )


def brightness(encoder: nn.Module | None, images: Tensor) -> None:
    """Warn about images in 0..255 before an encoder."""
    if encoder is None or not images.is_floating_point() or images.numel() == 0:
        return
    most = float(images.abs().amax())
    if most > BRIGHTEST:
        log.warning(
            "images reach %g, networks take pixels in [-1, 1]; divide by 127.5 and subtract 1, or give the "
            "data set lasnn_sj.data.transforms", most,
        )  # fmt: skip


def hints(student: nn.Module, encoder: nn.Module | None, images: Tensor, axis: int) -> str:
    """Suggest remedies for a batch that a network cannot take.

    Args:
        student: the network.
        encoder: before it, if any.
        images: the batch as the loader gave it.
        axis: of its samples.
    """
    shape, found = tuple(images.shape), [f"; the batch is {tuple(images.shape)}"]
    single = [n for n, m in student.named_modules() if getattr(m, "step_mode", "m") == "s"]
    spiking = any(isinstance(module, base.MemoryModule) for module in student.modules())
    dtype = next((p.dtype for p in student.parameters() if p.is_floating_point()), torch.float32)
    built = getattr(student, "architecture", {"arguments": {}})["arguments"]
    size = (built.get("in_channels"), *2 * (built.get("image_size"),))
    if images.dim() == 4 and shape[3] <= 4 < shape[1] == shape[2]:
        found.append("images look like [N, H, W, C], give [N, C, H, W]: images.permute(0, 3, 1, 2)")
    elif images.dtype != dtype:
        found.append(f"it is {images.dtype}, the network's weights are {dtype}: give images.to({dtype})")
    elif encoder is None and images.dim() == 5 and axis == 0:
        found.append("frames look like [N, T, C, H, W], give [T, N, C, H, W]: images.transpose(0, 1)")
    elif encoder is None and spiking and images.dim() <= 4:
        found.append("a spiking student takes [T, N, ...]: give the trainer encoder=DirectEncoder(T)")
    elif encoder is not None and not spiking:
        found.append("the network is an ANN, which has no time steps: leave the encoder out")
    elif None not in size and shape[-3:] != size:
        found.append(f"the network was built for in_channels={size[0]}, image_size={size[1]}")
    elif single and encoder is not None:
        found.append(f"{single[0]} is in single-step mode: call functional.set_step_mode(student, 'm')")
    return "; ".join(found)


def _is_empty(loader: Iterable) -> bool:
    try:
        return len(loader) == 0
    except TypeError:  # unknown length
        return False


def teacher(teacher: nn.Module | None, objective: object) -> None:
    """Raise :class:`ValueError` if the objective lacks a teacher, or does not use the one given."""
    if isinstance(objective, type):
        raise ValueError(
            f"objective is the class {objective.__name__}; give objective={objective.__name__}(...)"
        )
    if not callable(objective):
        raise ValueError(
            f"objective must be callable with signals, got {objective!r}; give one of "
            f"lasnn_sj.distillation, such as LabelKD()"
        )
    wanted = bool(getattr(objective, "needs_teacher", False))
    if wanted and teacher is None:
        raise ValueError(
            f"the objective {sentence(objective)} needs a teacher; give one, or an objective without"
        )
    if teacher is not None and not wanted:
        raise ValueError(
            f"the objective {sentence(objective)} makes no use of the teacher; leave the teacher out, or add "
            f"an objective that uses it, such as Attention() or LabelKD(); one of your own that reads the "
            f"teacher's logits says so by needs_teacher = True"
        )


def settings(optimizer: object, scheduler: object, options: object, callbacks: object, seed: object) -> None:
    """Raise :class:`ValueError` for arguments of a wrong type, such as a class in place of an object."""
    for name, given, kinds, example in (
        ("optimizer", optimizer, Optimizer, "torch.optim.Adam(student.parameters(), lr=1e-4)"),
        ("scheduler", scheduler, (LRScheduler, ReduceLROnPlateau), "CosineAnnealingLR(optimizer, epochs)"),
        ("options", options, TrainingOptions, 'TrainingOptions(precision="bfloat16")'),
    ):
        if given is not None and not isinstance(given, kinds):
            what = f"the class {given.__name__}" if isinstance(given, type) else repr(given)
            raise ValueError(f"{name} must be an object such as {example}, got {what}")
    if not isinstance(callbacks, Sequence) or any(isinstance(one, type) for one in callbacks):
        raise ValueError(f"callbacks must be a list of objects, such as [MyCallback()], got {callbacks!r}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, Integral)):
        raise ValueError(f"seed must be a whole number or None, got {seed!r}")


def optimizer(student: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    """Raise :class:`ValueError` if optimizer or scheduler would not train the student."""
    rates = [float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups]
    if not all(map(math.isfinite, rates)):
        raise ValueError(
            f"optimizer has lr = {rates[0]:g}, which is not finite; give a learning rate above 0"
        )
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
    if not any(rates):
        raise ValueError("optimizer has lr = 0, so nothing would be trained; give a learning rate above 0")
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError(
            f"scheduler ({type(scheduler).__name__}) belongs to another optimizer than the trainer's; give "
            f"the optimizer that it was made for, too"
        )
