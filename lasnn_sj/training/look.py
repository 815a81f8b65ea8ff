"""Dry run on a small batch before training: checks of the networks, and the needs of the objective."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from spikingjelly.activation_based import base, functional
from torch import Tensor, nn

from ..distillation.objective import Look, Needs, needs_of
from ..models.readout import BatchError, class_scores
from . import checks
from .silence import batch_norms, silent, warn_of_silence, watched

if TYPE_CHECKING:
    from .trainer import Trainer

log = logging.getLogger(__name__)

FIRST = 32  # samples that a layer may be silent on


def look_at(trainer: Trainer, images: Tensor, axis: int) -> tuple[Look, Needs]:
    """Run the networks on two samples, report mistakes, and ask the objective for its needs.

    Args:
        trainer: its student in evaluation mode, without gradients.
        images: a batch as the loader gives it, on the training device.
        axis: of the samples.

    Raises:
        BatchError: the student cannot take the batch, or gives no class scores.
        ValueError: the teacher gives no logits.
    """
    student, teacher, encoder = trainer.student, trainer.teacher, trainer.encoder
    small = images.narrow(axis, 0, min(2, images.shape[axis]))
    checks.brightness(encoder, small)
    state = trainer.progress.random_state()
    encoded = small if encoder is None else encoder(small)
    with watched(student) as fired, _single_steps(student, encoded):
        try:
            outputs = student(encoded)
            scores = class_scores(outputs, small.shape[axis], trainer.readout)
        except torch.cuda.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            raise BatchError(f"{_first_line(error)}{checks.hints(student, encoder, images, axis)}") from error
    functional.reset_net(student)
    _check_memory(trainer, small, state, outputs)
    if silent(fired) or not bool(scores.any()):
        _name_silent(trainer, images, axis)
    look = Look(student, teacher, encoded, small, outputs, scores.shape[1], trainer.options.time_chunks)
    return look, _needs(trainer, look)


def _name_silent(trainer: Trainer, images: Tensor, axis: int) -> None:
    """Warn about layers that are silent on more samples too."""
    state, samples = trainer.progress.random_state(), min(FIRST, images.shape[axis])
    images = images.narrow(axis, 0, samples)
    with watched(trainer.student) as fired, _statistics_of_the_batch(trainer.student):
        outputs = trainer.student(images if trainer.encoder is None else trainer.encoder(images))
    functional.reset_net(trainer.student)
    trainer.progress.set_random_state(state)
    names = silent(fired) + ([] if bool(outputs.any()) else ["the output"])
    if names:
        warn_of_silence(names, samples, trainer.student)


@contextmanager
def _statistics_of_the_batch(student: nn.Module) -> Iterator[None]:
    """Context in which batch norm uses batch statistics, without updating the running ones."""
    norms = batch_norms(student)
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    modes = [norm.training for norm in norms]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm, mode in zip(norms, modes):
            norm.train(mode)
        for buffer, value in before:
            buffer.copy_(value)


def _check_memory(trainer: Trainer, small: Tensor, state: dict, outputs: Tensor) -> None:
    """Warn if the same input gives another output after ``reset_net``."""
    after = trainer.progress.random_state()
    trainer.progress.set_random_state(state)
    encoded = small if trainer.encoder is None else trainer.encoder(small)
    again = trainer.student(encoded)
    functional.reset_net(trainer.student)
    trainer.progress.set_random_state(after)
    same = again.shape == outputs.shape and torch.allclose(again, outputs, 1e-2, 1e-4, equal_nan=True)
    if not same:
        log.warning(
            "the student gives another output for the same input after functional.reset_net: it keeps a "
            "state that SpikingJelly does not reset (as snnTorch's neurons do); reset it in the student's "
            "forward"
        )


@contextmanager
def _single_steps(student: nn.Module, encoded: Tensor) -> Iterator[None]:
    """Refuse layers in single-step mode that are given all time steps at once."""
    found: list[str] = []

    def hook_of(name: str):
        def hook(module: nn.Module, args: tuple) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape[:2] == encoded.shape[:2]:
                found.append(name)

        return hook

    hooks = [
        module.register_forward_pre_hook(hook_of(name or "(itself)"))
        for name, module in student.named_modules()
        if _is_single_step(module) and len(encoded) > 1
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if found:
        raise BatchError(
            f"the student's {', '.join(found[:4])} is in single-step mode and is given all time steps at "
            f"once; call functional.set_step_mode(student, 'm')"
        )


def _is_single_step(module: nn.Module) -> bool:
    """Return whether a stateful layer is in single-step mode, as in a network that loops over time."""
    if not isinstance(module, base.MemoryModule) or module.step_mode != "s":
        return False
    return sum(isinstance(part, base.MemoryModule) for part in module.modules()) == 1


def _needs(trainer: Trainer, look: Look) -> Needs:
    """Ask the objective for its needs and check that the teacher can meet them."""
    theirs = None
    if trainer.teacher is not None:
        try:
            theirs = trainer.teacher(look.images)
        except (RuntimeError, ValueError, IndexError) as error:
            raise BatchError(
                f"the teacher cannot take images {tuple(look.images.shape)}: {_first_line(error)}"
            ) from error
    try:
        needs = needs_of(trainer.objective, look)
    except (AttributeError, TypeError):
        _check_logits(theirs, look)
        raise
    if needs.teacher_logits or needs.teacher_gradients:
        _check_logits(theirs, look)
    return needs


def _check_logits(logits: object, look: Look) -> None:
    if logits is None or (isinstance(logits, Tensor) and logits.shape[1:] == (look.num_classes,)):
        return
    got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
    raise ValueError(
        f"the teacher must give logits [N, {look.num_classes}], as many classes as the student, got {got}; "
        f"wrap it in a module that returns them"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
