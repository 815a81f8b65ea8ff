"""Sizes at which tables are run: the paper's settings, an hour on two cores, or seconds for a test."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from torch import nn

from ..analysis.stages import STAGES
from ..data import events
from ..data import images as data
from ..data.encoding import DirectEncoder
from .recipes import Recipe, ReverseRecipe
from .tables import Row

Scale = Literal["full", "small", "smoke"]
SCALES = ("full", "small", "smoke")

PAPER_DVS = ReverseRecipe(epochs=200, batch=16, optimizer="adam", lr=1e-3, weight_decay=0.0)
SMALL_WIDTH = {"conv3_linear2": 0.25}  # a narrow network already; of all others an eighth
SMALL_LASNN = Recipe(
    teacher_epochs=30, teacher_lr=0.1, teacher_batch=64, ann_epochs=60, ann_lr=0.05, ann_batch=64,
    calibration_images=256, calibration_steps=100, threshold_scale=0.4, epochs=12, lr=5e-4, batch=32,
    validate_every=12,
)  # fmt: skip
SMALL_REVERSE = ReverseRecipe(width=0.125, epochs=6, batch=64, validate_every=6)
SMALL_DVS = replace(PAPER_DVS, width=0.125, epochs=12, batch=10, lr=3e-3)
SMOKE_LASNN = Recipe(
    width=0.1, teacher_width=0.25, teacher_epochs=1, teacher_lr=0.1, teacher_batch=32,
    ann_epochs=8, ann_lr=0.1, ann_batch=16, calibration_images=32, calibration_steps=10,
    threshold_scale=0.5, epochs=1, lr=1e-3,
)  # fmt: skip
SMOKE_REVERSE = ReverseRecipe(width=0.0625, epochs=1, batch=32)


@dataclass(frozen=True)
class Lasnn:
    """Settings of a row of LaSNN's tables."""

    recipe: Recipe
    reduced: str


@dataclass(frozen=True)
class Reverse:
    """Settings of a row of reverse distillation's tables."""

    recipe: ReverseRecipe
    T: int
    framing: events.Framing | None
    reduced: str

    def encoder(self) -> nn.Module | None:
        """Return the encoder of images; ``None`` for event frames."""
        if self.framing is not None:
            return None
        return DirectEncoder(self.T)


def lasnn(row: Row, scale: Scale, seed: int) -> Lasnn:
    """Return the settings of a row; ``reduced`` lists reductions from the paper's, none at full scale."""
    T = row.T if scale == "full" else max(4, round(row.T * 0.08)) if scale == "small" else 4
    base = {"full": Recipe(), "small": SMALL_LASNN, "smoke": SMOKE_LASNN}[scale]
    if scale != "smoke" and not row.reverse:
        T //= STAGES[row.method].steps  # the stage multiplies by itself
    if scale == "small":
        base = replace(base, width=SMALL_WIDTH.get(row.net, 0.125))
    teacher = row.teacher if scale == "full" else "resnet20"
    recipe = replace(
        base, student=row.net, T=T, encoding=row.encoding, attention=row.attention, teacher=teacher, seed=seed
    )
    return Lasnn(recipe, _reduced_lasnn(row, scale, recipe))


def _reduced_lasnn(row: Row, scale: Scale, recipe: Recipe) -> str:
    if scale == "full":
        return ""
    ran = recipe.T * STAGES[row.method].steps
    parts = [_fewer(scale, "4,000 images"), f"width {recipe.width:g}"]
    if row.method == "ann":
        parts.append(f"{recipe.ann_epochs} of 200 epochs")
    else:
        parts.append(f"T {ran} of {row.T}")
    if STAGES[row.method].trained:
        parts.append(f"{recipe.epochs} of 100 epochs")
    if STAGES[row.method].teacher == "ann" and row.teacher != recipe.teacher:
        parts.append(f"teacher {recipe.teacher} for {row.teacher}")
    return ", ".join(parts)


def _fewer(scale: Scale, small: str) -> str:
    return "256 digits" if scale == "smoke" else small


def reverse_kd(row: Row, scale: Scale, seed: int) -> Reverse:
    """As :func:`lasnn`, for the second paper."""
    on_events = row.dataset == "dvs-gesture"
    if scale == "full":
        recipe = PAPER_DVS if on_events else ReverseRecipe()
        T, shrink = row.T, 1
    elif scale == "small":
        recipe = SMALL_DVS if on_events else SMALL_REVERSE
        T, shrink = (8, 8) if on_events else (row.T, 2)
    else:
        recipe, T, shrink = SMOKE_REVERSE, 2, 1
        on_events = False
    framing = events.Framing(T=T, shrink=shrink) if on_events else None
    recipe = replace(recipe, student=row.net, seed=seed)
    if scale == "full":
        return Reverse(recipe, T, framing, "")
    images = "not augmented" if on_events else "4,500 images of 10 classes"
    parts = [_fewer(scale, images), f"width {recipe.width:g}", f"{recipe.epochs} of 200 epochs"]
    if T != row.T:
        parts.append(f"T {T} of {row.T}")
    if shrink > 1:
        parts.append(f"{(128 if on_events else 32) // shrink} pixels")
    return Reverse(recipe, T, framing, ", ".join(parts))


@lru_cache(maxsize=4)
def images(dataset: str, scale: Scale, root: Path, second_paper: bool = False) -> data.ImageData:
    """Load the images of a row from ``root/NAME.npz`` if it exists, else by :func:`data.load`.

    At full scale all training images train, as in the papers; otherwise some are held out for validation.
    """
    if scale == "smoke":
        return data.load("digits").split(100).subset(256, 64)
    file = root / f"{dataset}.npz"
    shrink = 2 if second_paper and scale == "small" else 1
    loaded = data.load(file if file.is_file() else dataset, root, shrink=shrink)
    if scale == "full":
        return loaded
    loaded = loaded.split(len(loaded.train) // 10)
    if second_paper:
        return loaded.first_classes(10, 450)
    return loaded.subset(4000, 5000, 1000)


@lru_cache(maxsize=2)
def recordings(dataset: str, framing: events.Framing, augment: bool, root: Path) -> events.EventData:
    """Load the event frames of a row."""
    return events.load(dataset, root, framing, augment)
