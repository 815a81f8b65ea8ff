"""Accuracy of a network on the batches of a loader, and checks of every batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from ..data.late_checks import require
from ..models.readout import BatchError, class_scores, resolve_readout
from ..runtime import distributed
from ..runtime.progress import progress_bar
from . import checks
from .dataloader import evaluation_share
from .silence import silent, warn_of_silence, watched

MOST_AT_ONCE = 2048  # samples times time steps that are run together


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Context with evaluation mode and reset neurons; restores each module's mode and resets again."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
        functional.reset_net(model)
    try:
        yield
    finally:
        for module, training in modes:  # some may stay in evaluation mode while the others train
            module.training = training
        for model in models:
            functional.reset_net(model)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    encoder: nn.Module | None = None,
    *,
    readout: Literal["auto", "last", "mean"] = "auto",
    device: torch.device | str | None = None,
    chunk: int | None = None,
    over_time: bool = False,
    confusion: bool = False,
    early_exit: float | Sequence[float] | None = None,
    exit_by: Literal["confidence", "entropy"] = "confidence",
) -> dict[str, float | list[float] | Tensor]:
    """Compute loss and accuracy of an SNN (with an encoder) or an ANN (without) on the batches of a loader.

    Batches are run in pieces of at most 2048 samples times time steps, which limits the memory that many
    steps take. With several processes, all must call it; each evaluates a share of the samples and all get
    the same result.

    Args:
        model: gives class scores ``[N, K]`` or ``[T, N, K]``; its mode is restored afterwards.
        loader: batches ``(images, labels)``.
        encoder: gives the input its time axis.
        readout: as for :class:`LaSNNTrainer`.
        device: the model's if not given.
        chunk: time steps held in memory at once, all if not given. For networks whose layers carry their
            state from step to step, as those of :mod:`lasnn_sj.models` do; layers that look at the whole
            sequence need it whole.
        over_time: also say what the accuracy would be if the network were stopped after each step.
        confusion: also count the predictions of each class.
        early_exit: also say what a run would give that stops each sample once its prediction is sure: at the
            first step where the largest probability is at least this threshold, or the last step. Of several
            thresholds each is tried.
        exit_by: ``"confidence"`` as above, or ``"entropy"``: the prediction's entropy, in units of that of
            even odds, ``log K``, is at most the threshold.

    Returns:
        ``loss`` (mean cross-entropy), ``top1`` (percent of all samples), ``samples``; with ``over_time``
        also ``top1_over_time``, the ``T`` values of ``top1`` after step 1 to ``T``, from the same pass; with
        ``confusion`` also ``confusion``, ``[K, K]`` int64: samples of each class (row) by prediction; with
        ``early_exit`` also ``early_exit_top1`` and ``early_exit_steps``, the mean number of steps used, from
        the same pass; lists where several thresholds were given.

    Raises:
        BatchError: an empty loader or a batch that cannot be used.
        ValueError: ``over_time`` or ``early_exit`` for a network that gives no scores of single steps, or a
            threshold outside [0, 1].
    """
    checks.no_data_set("loader", loader)
    device = torch.device(device) if device is not None else device_of(model)
    readout = resolve_readout(model, readout)
    thresholds = [early_exit] if isinstance(early_exit, (int, float)) else list(early_exit or ())
    if not all(0 <= threshold <= 1 for threshold in thresholds):
        raise ValueError(f"early_exit must lie in [0, 1], got {early_exit}")
    if exit_by not in ("confidence", "entropy"):
        raise ValueError(f'exit_by must be "confidence" or "entropy", got {exit_by!r}')
    by_step, exits = over_time or bool(thresholds), 0
    hits = counts = 0
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # of loss, right answers, samples
    bar = progress_bar(
        evaluation_share(loader), quiet=not distributed.is_main(), desc="evaluating", leave=False, delay=2
    )
    with evaluating(model):
        for index, (where, images, labels) in enumerate(_pieces(bar, encoder, chunk)):
            images = images.to(device, non_blocking=True)
            if index == 0:
                checks.brightness(encoder, images)
            with nullcontext({}) if index else watched(model) as fired:
                try:
                    scores, steps = _scores(model, images, len(labels), encoder, readout, chunk, by_step)
                except torch.cuda.OutOfMemoryError:
                    raise
                except (RuntimeError, IndexError, AssertionError) as error:
                    hints = checks.hints(model, encoder, images, batch_axis(images, labels))
                    raise BatchError(f"{where}: {str(error).partition(chr(10))[0]}{hints}") from error
            functional.reset_net(model)
            if silent(fired):
                warn_of_silence(silent(fired), len(labels), model)
            check_labels(labels, scores.shape[1], where)
            labels = labels.to(device)
            if over_time:
                hits = hits + (steps.argmax(2) == labels).sum(1)
            if thresholds:
                exits = exits + _exits(steps, labels, thresholds, exit_by)
            loss, guesses = F.cross_entropy(scores, labels, reduction="sum"), scores.argmax(1)
            right = (guesses == labels).sum()
            if confusion:
                K = scores.shape[1]
                counts = counts + torch.bincount(K * labels + guesses, minlength=K * K)
            sums += torch.stack([loss.double(), right.double(), loss.new_tensor(len(labels)).double()])
    loss, right, samples = distributed.total(sums).tolist()
    if not samples:
        raise BatchError("the evaluation loader gave no batch")
    result = {"loss": loss / samples, "top1": 100 * right / samples, "samples": int(samples)}
    if over_time:
        result["top1_over_time"] = (100 * _over_all(hits, device) / samples).tolist()
    if thresholds:
        right, used = (_over_all(exits, device) / samples).view(2, -1)
        found = {"early_exit_top1": (100 * right).tolist(), "early_exit_steps": used.tolist()}
        if isinstance(early_exit, (int, float)):
            found = {name: value for name, (value,) in found.items()}
        result |= found
    if confusion:
        counts = _over_all(counts, device).long().cpu()
        result["confusion"] = counts.view(round(len(counts) ** 0.5), -1)
    return result


def _exits(steps: Tensor, labels: Tensor, thresholds: Sequence[float], by: str) -> Tensor:
    """Count correct predictions and used steps per threshold, for samples that stop once confident."""
    log_p = steps.float().log_softmax(2)
    if by == "confidence":
        surety = log_p.amax(2).exp()
    else:
        surety = (log_p.exp() * log_p).sum(2)
        thresholds = [-threshold * math.log(steps.shape[2]) for threshold in thresholds]
    hits, right, used = steps.argmax(2) == labels, [], []
    for threshold in thresholds:
        sure = surety >= threshold
        sure[-1] = True
        stop = sure.int().argmax(0)  # the first confident step
        right.append(hits.gather(0, stop.unsqueeze(0)).sum())
        used.append((stop + 1).sum())
    return torch.stack(right + used).double()


def _over_all(counts: Tensor | int, device: torch.device) -> Tensor:
    """Sum a vector over all processes; a process without samples contributes 0."""
    size = max(distributed.of_all(len(counts) if isinstance(counts, Tensor) else 0))
    return distributed.total(torch.zeros(size, dtype=torch.float64, device=device) + counts)


def _pieces(
    loader: Iterable, encoder: nn.Module | None, chunk: int | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the pieces of a loader's batches, each with the name of its batch."""
    for index, batch in enumerate(loader):
        where = f"evaluation batch {index}"
        for images, labels in in_pieces(*check_batch(batch, where), encoder, chunk):
            yield where, images, labels


def in_pieces(
    images: Tensor, labels: Tensor, encoder: nn.Module | None, chunk: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a batch in pieces of at most :data:`MOST_AT_ONCE` samples times steps, at least one sample each.

    Args:
        images, labels: the batch.
        encoder: gives images their time axis; ``None`` for images and event frames as they are.
        chunk: time steps that are run at once, all if not given.
    """
    axis = batch_axis(images, labels)
    steps = getattr(encoder, "T", 1) if encoder is not None else len(images) if axis else 1
    size = max(1, MOST_AT_ONCE // min(steps, chunk or steps))
    yield from zip(images.split(size, axis), labels.split(size))


def encoded_pieces(encoder: nn.Module | None, images: Tensor, chunk: int | None) -> Iterator[Tensor]:
    """Yield an encoded batch in chunks of at most ``chunk`` time steps."""
    if encoder is None or chunk is None or chunk >= encoder.T:
        yield images if encoder is None else encoder(images)
        return
    for start in range(0, encoder.T, chunk):
        yield encoder.steps(images, min(chunk, encoder.T - start))


def _scores(
    model: nn.Module,
    images: Tensor,
    batch: int,
    encoder: nn.Module | None,
    readout: str,
    chunk: int | None,
    over_time: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute class scores ``[N, K]``; with ``over_time`` also those after each step, ``[T, N, K]``."""
    total, T, so_far = 0.0, 0, []
    for piece in encoded_pieces(encoder, images, chunk):
        outputs = model(piece)
        scores = class_scores(outputs, batch, readout)
        if over_time:
            if outputs.dim() != 3:
                raise ValueError(
                    f"early_exit or over_time needs a network that gives scores of every step, [T, N, K], "
                    f"{type(model).__name__} gives {tuple(outputs.shape)}"
                )
            if readout != "last":
                count = torch.arange(T + 1, T + len(outputs) + 1, device=outputs.device).view(-1, 1, 1)
                outputs = (outputs.float().cumsum(0) + total) / count
            so_far.append(outputs)
        total, T = total + scores * len(piece), T + len(piece)
    return scores if readout == "last" else total / T, torch.cat(so_far) if over_time else None


def accuracy_over_time(
    model: nn.Module,
    loader: Iterable,
    encoder: nn.Module | None = None,
    *,
    device: torch.device | str | None = None,
    chunk: int | None = None,
) -> list[float]:
    """Compute the top-1 accuracy in percent after step 1, 2, ..., ``T`` in one pass; see :func:`evaluate`."""
    result = evaluate(model, loader, encoder, device=device, chunk=chunk, over_time=True)
    return result["top1_over_time"]


def check_batch(batch: object, where: str) -> tuple[Tensor, Tensor]:
    """Check a batch of a loader and return its images and labels.

    Raises:
        BatchError: not a pair of tensors, no sample, NaN or infinity, or labels that are not integers.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        many = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise BatchError(f"{where}: the loader must give (images, labels), got {type(batch).__name__}{many}")
    images, labels = batch
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        raise BatchError(
            f"{where}: images and labels must be tensors, got {type(images).__name__} and "
            f"{type(labels).__name__}"
        )
    if labels.dim() != 1 or labels.numel() == 0 or labels.is_floating_point():
        raise BatchError(
            f"{where}: labels must be whole numbers [N] with N >= 1, got {labels.dtype} {tuple(labels.shape)}"
        )
    if images.dtype == torch.uint8:
        raise BatchError(
            f"{where}: images are uint8, networks take floats in [-1, 1]; give the data set "
            f"lasnn_sj.data.transforms, or images.float() / 127.5 - 1"
        )
    finite = torch.isfinite(images).movedim(batch_axis(images, labels), 0)

    def not_finite() -> BatchError:
        bad = torch.nonzero(~finite.reshape(len(finite), -1).all(1)).flatten().tolist()
        return BatchError(f"{where}: images hold NaN or infinity, in samples {bad[:8]}")

    require(finite.all(), not_finite)
    return images, labels.long()


def batch_axis(images: Tensor, labels: Tensor) -> int:
    """Return the axis of the samples: 1 for batches with a time axis, such as event frames, else 0.

    If ``T = N``, only frames ``[T, N, C, H, W]`` can be told from images.
    """
    timed = images.dim() > 2 and images.shape[1] == len(labels)
    return int(timed and (images.dim() == 5 or len(images) != len(labels)))


def check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    """Require labels in [0, num_classes); the error is a :class:`BatchError`."""

    def out_of_range() -> BatchError:
        return BatchError(
            f"{where}: labels must lie in [0, {num_classes}), the student's classes, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )

    require((labels >= 0) & (labels < num_classes), out_of_range)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a network's weights; the CPU if it has none."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
