"""Accuracy of a network on a loader's batches, and what is checked of every batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm.auto import tqdm

from .objectives import BatchError, class_scores, resolve_readout


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    encoder: nn.Module | None = None,
    *,
    readout: Literal["auto", "last", "mean"] = "auto",
    device: torch.device | str | None = None,
    chunk: int | None = None,
) -> dict[str, float]:
    """Accuracy of an SNN (with an encoder) or an ANN (without) on a loader's batches.

    Args:
        model: gives class scores ``[N, K]`` or ``[T, N, K]``; its mode is restored afterwards.
        loader: batches ``(images, labels)``.
        encoder: gives the input its time axis.
        readout: as for :class:`LaSNNTrainer`.
        device: the model's if not given.
        chunk: time steps held in memory at once, all if not given. For networks whose layers carry their
            state from step to step, as those of :mod:`lasnn_sj.models` do; layers that look at the whole
            sequence need it whole.

    Returns:
        ``loss`` (mean cross-entropy), ``top1`` (percent of all samples), ``samples``.

    Raises:
        BatchError: an empty loader or a batch that cannot be used.
    """
    device = torch.device(device) if device is not None else device_of(model)
    readout = resolve_readout(model, readout)
    training, loss, correct = model.training, MeanMetric().to(device), None
    model.eval()
    functional.reset_net(model)
    try:
        for index, batch in enumerate(tqdm(loader, desc="evaluating", leave=False, disable=None)):
            where = f"evaluation batch {index}"
            images, labels = check_batch(batch, where)
            images = images.to(device, non_blocking=True)
            scores = _scores(model, images, len(labels), encoder, readout, chunk)
            functional.reset_net(model)
            check_labels(labels, scores.shape[1], where)
            labels = labels.to(device)
            if correct is None:
                correct = MulticlassAccuracy(scores.shape[1], average="micro").to(device)
            correct.update(scores, labels)
            loss.update(F.cross_entropy(scores, labels), len(labels))
    finally:
        functional.reset_net(model)
        model.train(training)
    if correct is None:
        raise BatchError("the evaluation loader gave no batch")
    samples = int(loss.weight.item())
    return {"loss": loss.compute().item(), "top1": 100 * correct.compute().item(), "samples": samples}


def _scores(
    model: nn.Module,
    images: Tensor,
    batch: int,
    encoder: nn.Module | None,
    readout: str,
    chunk: int | None,
) -> Tensor:
    if encoder is None or chunk is None or chunk >= encoder.T:
        return class_scores(model(images if encoder is None else encoder(images)), batch, readout)
    total, left = 0.0, encoder.T
    while left:
        steps = min(chunk, left)
        scores = class_scores(model(encoder.steps(images, steps)), batch, readout)
        total, left = total + scores * steps, left - steps
    return scores if readout == "last" else total / encoder.T


def check_batch(batch: object, where: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a loader's batch.

    Raises:
        BatchError: not a pair of tensors, no sample, NaN or infinity, labels that are no whole numbers.
    """
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise BatchError(f"{where}: the loader must give (images, labels), got {type(batch).__name__}")
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
    if not bool(torch.isfinite(images).all()):
        finite = torch.isfinite(images).movedim(batch_axis(images, labels), 0)
        bad = torch.nonzero(~finite.flatten(1).all(1)).flatten().tolist()
        raise BatchError(f"{where}: images hold NaN or infinity, in samples {bad[:8]}")
    return images, labels.long()


def batch_axis(images: Tensor, labels: Tensor) -> int:
    """1 where a batch has its time axis already, as event frames ``[T, N, C, H, W]`` do, else 0."""
    return int(images.dim() == 5 and images.shape[1] == len(labels))


def check_labels(labels: Tensor, num_classes: int, where: str) -> None:
    """Raise :class:`BatchError` for labels outside [0, num_classes)."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise BatchError(
            f"{where}: labels must lie in [0, {num_classes}), the student's classes, got {low} to {high}"
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a network's weights are; the CPU if it has none."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device
