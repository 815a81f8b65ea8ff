"""Options of training that are rarely touched."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch

DTYPES = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class TrainingOptions:
    """Precision, memory, gradients, checkpoints and early stopping of a training run.

    The defaults are the same on every device: float32, nothing compiled, whole batches.

    Args:
        precision: of convolutions and linear layers: ``"float32"``, ``"bfloat16"``, or ``"float16"`` with
            scaled gradients; potentials, maps and losses are float32 in each. On CUDA ``"float32"`` leaves
            PyTorch's flags alone, which by default use TF32 (10 bits of mantissa) in convolutions but not in
            linear layers; ``"tf32"`` uses it in both while a step runs. On a CPU both are float32.
        compile: ``True`` runs the student's pass through ``torch.compile``; the first steps take minutes.
            ``"graph"`` records a whole step, update included, as one CUDA graph within seconds and replays
            it. It needs a CUDA device, a single process, a fused optimizer, batches of one size
            (``drop_last=True``), and memory for the recording. Python code of encoder, networks and objective
            then runs only at the recording, which is made anew in each epoch.
        accumulate: split each batch into this many pieces, run one after the other, and add their
            gradients: the same step in less memory (except with batch norm, which sees a piece).
        time_chunks: run the time steps in this many pieces and keep only the neurons' state between them:
            the same gradients in less memory and about a third more time. Not with batch norm.
        clip_norm: maximum gradient norm, L2 over all parameters; ``None`` does not clip.
        on_nonfinite: at a loss or gradient that is NaN or infinite ``"stop"`` the run, or ``"skip"`` the
            batch and count it.
        checkpoint_every: steps, or time, between checkpoints; each epoch ends with one anyway.
        deterministic: let PyTorch use deterministic algorithms only while ``fit`` runs, so that two runs on
            one GPU are equal to the bit; an operation that has none raises an error. A CPU needs no such
            option.
        monitor: column of the metrics that ``keep_best`` and ``patience`` watch: ``"val_top1"``, the higher
            the better, or ``"val_loss"``, the lower the better. Both need a ``val_loader`` in ``fit``.
        keep_best: write the student's weights to ``best.safetensors`` in the run folder whenever the
            monitored column is the best so far; of equal epochs the first stays. The student itself goes on
            with its last weights; :func:`~lasnn_sj.training.load_weights` gives it the best ones.
        patience: stop after this many validations in a row without a new best; ``None`` never stops early.

    Raises:
        ValueError: a value out of range.
    """

    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    compile: bool | Literal["graph"] = False
    accumulate: int = 1
    time_chunks: int = 1
    clip_norm: float | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    checkpoint_every: int | timedelta = timedelta(minutes=10)
    deterministic: bool = False
    monitor: Literal["val_top1", "val_loss"] = "val_top1"
    keep_best: bool = False
    patience: int | None = None

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, tuple(DTYPES))
        if self.compile not in (False, True, "graph"):
            raise ValueError(f'compile must be False, True or "graph", got {self.compile!r}')
        check_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        check_count("accumulate", self.accumulate)
        check_count("time_chunks", self.time_chunks)
        check_choice("monitor", self.monitor, ("val_top1", "val_loss"))
        if self.patience is not None:
            check_count("patience", self.patience)
        if not (isinstance(self.checkpoint_every, timedelta) and self.checkpoint_every > timedelta(0)):
            check_count("checkpoint_every", self.checkpoint_every)
        if self.clip_norm is not None and not (
            isinstance(self.clip_norm, (int, float)) and self.clip_norm > 0
        ):
            raise ValueError(f"clip_norm must be above 0, or None, got {self.clip_norm!r}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise :class:`ValueError` where a value is not among those allowed."""
    if value not in allowed:
        *others, last = (f'"{one}"' for one in allowed)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def check_count(name: str, value: object) -> None:
    """Raise :class:`ValueError` where a value is not a whole number, at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
