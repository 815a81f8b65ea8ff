"""Stages of LaSNN and rows of reverse distillation: the folders that runs are made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stage:
    """A stage of LaSNN, or a baseline.

    Attributes:
        title: in tables.
        needs: stage whose network it begins with.
        leaves: kind of network that it keeps.
        trained: whether an SNN is trained by surrogate gradients.
        teacher: kind of network that teaches in it.
        steps: time steps in units of ``T``.
        extra: whether it is run only when it is named.
    """

    title: str
    needs: str | None = None
    leaves: Literal["ann", "snn"] | None = None
    trained: bool = False
    teacher: Literal["ann", "snn"] | None = None
    steps: int = 1
    extra: bool = False

    def label(self, T: int | None = None) -> str:
        """Return the title with the number of time steps, if any."""
        if self.leaves == "ann":
            return self.title
        if T is None:
            return self.title + (f", {self.steps} T" if self.steps > 1 else "")
        return f"{self.title}, T = {T * self.steps}"


STAGES: dict[str, Stage] = {
    "teacher": Stage("teacher", leaves="ann"),
    "ann": Stage("intermediate ANN", leaves="ann"),
    "converted": Stage("converted", needs="ann", leaves="snn"),
    "converted_10T": Stage("converted", needs="converted", steps=10),
    "calibrated": Stage("calibrated", needs="ann", extra=True),
    "start": Stage("start of training", needs="converted", leaves="snn"),
    "hybrid": Stage("hybrid (CE only)", needs="start", leaves="snn", trained=True),
    "label_kd": Stage("label distillation", "start", "snn", trained=True, teacher="ann", extra=True),
    "spike_kd": Stage(
        "spike-based KD (approximation)", "start", "snn", trained=True, teacher="snn", extra=True
    ),
    "lasnn": Stage("LaSNN", "start", "snn", trained=True, teacher="ann"),
}
ANNS = ("teacher", "ann")  # drawn apart from the students
ORDER = (*STAGES, "alone", "sparse", "default")


def title(kind: str) -> str:
    """Return the title of a stage or row of reverse distillation by the name of its folder."""
    if kind in STAGES:
        return STAGES[kind].label()
    name, _, ratio = kind.replace(" ", "_").partition("_")
    if name == "sparse" and ratio:
        return f"sparse-KD, pruned {ratio}" if ratio != "0" else "self-KD (teacher not pruned)"
    return {"alone": "student alone", "default": "teacher-default KD"}.get(kind, kind)


def place(kind: str) -> tuple[int, str]:
    """Sort key of folders in the order of the tables."""
    name = kind if kind in ORDER else kind.partition("_")[0]
    return ORDER.index(name) if name in ORDER else len(ORDER), kind


def folder_name(row: str) -> str:
    """Name of a row's folder: letters, digits, points and dashes, anything else as underscores."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", row).strip("_")
