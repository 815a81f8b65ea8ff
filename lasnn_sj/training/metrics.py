"""Means over an epoch, which can be saved, restored, and combined over processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

# Columns of metrics.csv in words, in the order of figures.
NAMES = {
    "loss": "training loss",
    "ce": "cross-entropy",
    "attention": "attention loss",
    "kd": "distillation loss",
    "spike_kd": "distillation loss of the spikes",
    "top1": "training accuracy, %",
    "val_loss": "validation cross-entropy",
    "val_top1": "validation accuracy, %",
    "attention_alpha": "weight of the attention loss",
    "lr": "learning rate",
}
_LOCAL = {"sync_on_compute": False, "compute_with_cache": False}


def name_of(column: str) -> str:
    """Return the name of a column of the metrics in words."""
    return NAMES.get(column, column.replace("_", " "))


def describe(row: Mapping[str, float]) -> str:
    """Format a row of the metrics as one line of text, its columns in words."""
    said = []
    for name, value in row.items():
        words, percent, _ = name_of(name).partition(", %")
        number = f"{value:.2f} %" if percent else f"{value:.4g}" if isinstance(value, float) else str(value)
        said.append(f"{words} {number}")
    return ", ".join(said)


def best_row(history: Sequence[Mapping[str, float]], column: str) -> Mapping[str, float] | None:
    """Return the first row with the lowest ``val_loss``, or the highest value of another column.

    Rows with NaN or without the column are ignored; ``None`` if no other rows exist.
    """
    sign = -1 if column == "val_loss" else 1
    rows = [row for row in history if math.isfinite(row.get(column, math.nan))]
    return max(rows, key=lambda row: sign * row[column], default=None)


def rows_since_best(history: Sequence[Mapping[str, float]], column: str) -> int:
    """Return the number of rows with the column after the best one."""
    best = best_row(history, column)
    return sum(column in row for row in history if best is None or row["epoch"] > best["epoch"])


class _Mean(MeanMetric):
    """``MeanMetric`` without its check for NaN, which waits for the device; steps are checked elsewhere."""

    def _cast_and_nan_check_input(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x.to(self.dtype), weight.to(self.dtype)


class EpochMetrics:
    """Losses and accuracy of the samples so far.

    Args:
        num_classes: ``K``.
        device: where the step's results are.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.device = device
        self.losses: dict[str, MeanMetric] = {}
        correct = MulticlassAccuracy(num_classes, average="micro", validate_args=False, **_LOCAL)
        self.correct = correct.to(device)
        self.correct.persistent(True)

    def update(
        self,
        parts: dict[str, Tensor],
        scores: Tensor,
        labels: Tensor,
        logged: dict[str, Tensor] | None = None,
        counts: bool = True,
    ) -> None:
        """Add a step's parts of the loss, class scores ``[N, K]``, labels ``[N]`` and logged numbers.

        A step that does not count (another process has its samples) adds nothing but the names.
        """
        if counts:
            self.correct.update(scores, labels)
        loss = {"loss": sum(parts.values())}
        weight = torch.full(
            (), float(len(labels) if counts else 0), device=self.device
        )  # a number would be copied there
        # The loss comes first, and is the sum even where a part has its name.
        for name, part in (loss | parts | (logged or {}) | loss).items():
            self._loss(name).update(part, weight)

    def compute(self, together: bool = True) -> dict[str, float]:
        """Compute ``loss``, its parts and ``top1`` in percent, over all processes or this one."""
        means = {name: _value(metric, together) for name, metric in self.losses.items()}
        return means | {"top1": 100 * _value(self.correct, together)}

    def state_dict(self) -> dict[str, object]:
        """Return the state for :meth:`restored`."""
        losses = {name: metric.state_dict() for name, metric in self.losses.items()}
        num_classes = self.correct.num_classes
        return {"num_classes": num_classes, "losses": losses, "correct": self.correct.state_dict()}

    @classmethod
    def restored(cls, state: dict[str, object], device: torch.device) -> EpochMetrics:
        """Create metrics that continue from :meth:`state_dict`."""
        metrics = cls(state["num_classes"], device)
        for name, saved in state["losses"].items():
            _restore(metrics._loss(name), saved)
        _restore(metrics.correct, state["correct"])
        return metrics

    def _loss(self, name: str) -> MeanMetric:
        if name not in self.losses:
            self.losses[name] = _Mean(**_LOCAL).to(self.device)
            self.losses[name].persistent(True)
        return self.losses[name]


def _restore(metric: Metric, saved: dict[str, Tensor]) -> None:
    metric.load_state_dict(saved)
    metric._update_count = 1  # else it warns that there is nothing to compute from


def _value(metric: Metric, together: bool) -> float:
    with metric.sync_context(should_sync=together, should_unsync=together):
        return metric.compute().item()
