"""The papers' tables and figures as data: what was trained on what, and the number that is printed.

LaSNN (Hong et al.): Tables I to IV, Figs. 3 to 7. Reverse distillation (Xu et al.): Tables 1 to 3. A figure
whose numbers are not written anywhere has rows without one. LaSNN's paper contradicts itself in places: its
3Conv2Linear has 83.27 % in Table I and 83.65 % in Tables II and III; its VGG16 has 91.53 % as a teacher
(Table IV) and 92.35 % as an ANN (Table II). Each table has the number that is printed in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Row:
    """One number of a table.

    Attributes:
        dataset: ``"cifar10"``, ``"cifar100"``, ``"tiny-imagenet"`` or ``"dvs-gesture"``.
        net: the student, by its name in :mod:`lasnn_sj.models`.
        method: for LaSNN a stage of :class:`~lasnn_sj.experiments.pipeline.Pipeline`, for reverse
            distillation a row of :class:`~lasnn_sj.experiments.reverse.ReversePipeline`.
        paper: printed top-1 accuracy in percent.
        T: time steps.
        teacher, attention, encoding: of LaSNN's rows.
        paper_spikes: printed mean spikes per neuron.
        paper_teacher: printed top-1 accuracy of the pruned teacher.
        paper_minutes: printed time of an epoch, in minutes on one RTX 3090.
        paper_gb: printed GPU memory.
        note: what a reader must know of the printed number.
        cited: whether the number is another work's whose network is not built here, so that it is not run.
    """

    dataset: str
    net: str
    method: str
    paper: float | None = None
    T: int = 100
    teacher: str = "vgg16"
    attention: Literal["activation", "gradient"] = "activation"
    encoding: Literal["poisson", "direct"] = "poisson"
    paper_spikes: float | None = None
    paper_teacher: float | None = None
    paper_minutes: float | None = None
    paper_gb: float | None = None
    note: str = ""
    cited: bool = False

    @property
    def name(self) -> str:
        """``dataset/net/method`` and what sets the row apart from others of its table."""
        parts = [self.dataset, self.net, self.method.replace(" ", "-")]
        if self.method == "lasnn":
            parts += [self.attention, self.teacher]
        if not self.reverse and self.method != "ann":
            parts.append(f"{self.encoding}-T{self.T}")
        return "/".join(parts)

    @property
    def reverse(self) -> bool:
        """True if the row belongs to the second paper."""
        return self.method.split()[0] in ("alone", "sparse", "default")


@dataclass(frozen=True)
class Table:
    """A table or figure.

    Attributes:
        title: what it compares.
        rows: its numbers.
        small: of which networks ``scale="small"`` runs the rows, unless rows are named.
    """

    title: str
    rows: tuple[Row, ...]
    small: tuple[str, ...]


# Table IV tells which teacher the numbers of Table II had; of 3Conv2Linear, VGG7 and VGG16 nothing is said.
BEST_TEACHER = {"vgg5": "vgg16", "vgg9": "vgg16", "resnet12": "densenet121"}
UNKNOWN_TEACHER = "teacher not stated"
WITHOUT = "'without LaSNN': the initial SNN of stage 3"
# Fig. 5b: minutes and GB of an epoch at T = 100, of activations and of gradients.
COSTS = {
    "vgg5": ((34, 4.89), (76, 7.13)), "vgg9": ((56, 6.23), (117, 9.59)), "resnet12": ((76, 4.71), (60, 7.51)),
}  # fmt: skip


def _table_2(dataset: str, net: str, ann: float, hybrid: float, label_kd: float, lasnn: float) -> list[Row]:
    teacher = BEST_TEACHER.get(net, "densenet121" if net == "vgg16" else "vgg16")
    note = "" if net in BEST_TEACHER else UNKNOWN_TEACHER
    return [
        Row(dataset, net, "ann", ann),
        Row(dataset, net, "converted", note="not in the paper's table"),
        Row(dataset, net, "converted_10T", T=1000, note="not in the paper's table"),
        Row(dataset, net, "hybrid", hybrid),
        Row(dataset, net, "label_kd", label_kd, teacher=teacher, note=note),
        Row(dataset, net, "lasnn", lasnn, teacher=teacher, note=note),
        Row(dataset, net, "lasnn", teacher=teacher, attention="gradient", note="not in the paper's table"),
    ]


def _table_4(net: str, ann: float, without: float, lasnn: tuple[float, float, float]) -> list[Row]:
    teachers = ("densenet121", "vgg16", "resnet20")
    return [
        Row("cifar10", net, "ann", ann),
        Row("cifar10", net, "start", without, note=WITHOUT),
        *(Row("cifar10", net, "lasnn", p, teacher=t) for p, t in zip(lasnn, teachers, strict=True)),
    ]


def _figure_4(
    dataset: str, net: str, without: float | None, hybrid: float, lasnn: float, teacher: str
) -> list[Row]:
    note = "drawn, number from Table II"
    return [
        Row(dataset, net, "start", without, note=WITHOUT),
        Row(dataset, net, "hybrid", hybrid, note=note),
        Row(dataset, net, "lasnn", lasnn, teacher=teacher, note=note),
    ]


def _figure_5(net: str, activation: float) -> list[Row]:
    teacher = BEST_TEACHER[net]
    drawn = "drawn, number not printed"
    (minutes, gb), (gradient_minutes, gradient_gb) = COSTS[net]
    return [
        Row("cifar10", net, "lasnn", activation, teacher=teacher, paper_minutes=minutes, paper_gb=gb,
            note="drawn, number from Table II"),
        Row("cifar10", net, "lasnn", teacher=teacher, attention="gradient", paper_minutes=gradient_minutes,
            paper_gb=gradient_gb, note=drawn),
        Row("cifar10", net, "lasnn", T=30, teacher=teacher, attention="gradient", note=drawn),
    ]  # fmt: skip


def _figure_6(net: str, poisson: float, spikes: float, direct: float, T: int) -> list[Row]:
    teacher = BEST_TEACHER[net]
    return [
        Row("cifar10", net, "lasnn", poisson, teacher=teacher, paper_spikes=spikes),
        Row("cifar10", net, "lasnn", direct, T=T, teacher=teacher, encoding="direct"),
    ]


def _sparse(
    dataset: str, net: str, T: int, alone: float, by_ratio: dict[float, tuple[float, float]]
) -> list[Row]:
    """``by_ratio``: accuracy of the pruned teacher, and of the student it taught."""
    rows = [Row(dataset, net, "alone", alone, T)]
    for ratio, (teacher, student) in by_ratio.items():
        rows.append(Row(dataset, net, f"sparse {ratio:g}", student, T, paper_teacher=teacher))
    return rows


def _default(dataset: str, net: str, T: int, alone: float, student: float) -> list[Row]:
    return [Row(dataset, net, "alone", alone, T), Row(dataset, net, "default", student, T)]


C10, C100, TINY, DVS = "cifar10", "cifar100", "tiny-imagenet", "dvs-gesture"
R18, WRN, V16 = "spiking_resnet18", "spiking_wrn16_4", "spiking_vgg16"
CITED = "cited by the paper from other work"

TABLES: dict[str, Table] = {
    "I": Table(
        "LaSNN and converted SNNs",
        (
            Row(C10, "2Conv2Linear", "converted", 82.95, T=6000, note=f"{CITED}; not built here", cited=True),
            Row(C10, "conv3_linear2", "converted", 77.43, T=400, note=CITED),
            Row(C10, "vgg16", "converted", 91.55, T=2500, note=CITED),
            Row(C10, "conv3_linear2", "lasnn", 83.27, note=UNKNOWN_TEACHER),
            Row(C10, "vgg16", "lasnn", 91.22, teacher="densenet121", note=UNKNOWN_TEACHER),
        ),
        small=("conv3_linear2",),
    ),
    "II": Table(
        "hybrid training, label distillation and LaSNN",
        (
            *_table_2(C10, "conv3_linear2", 80.38, 82.05, 82.27, 83.65),
            *_table_2(C10, "vgg5", 87.58, 85.76, 85.94, 86.68),
            *_table_2(C10, "vgg9", 88.84, 86.35, 86.39, 87.58),
            *_table_2(C10, "resnet12", 92.46, 90.70, 90.72, 91.34),
            *_table_2(C10, "vgg16", 92.35, 90.53, 90.60, 91.22),
            *_table_2(C100, "vgg7", 64.61, 60.69, 60.83, 61.52),
            *_table_2(TINY, "vgg16", 48.39, 39.48, 45.49, 47.44),
        ),
        small=("conv3_linear2", "vgg5"),
    ),
    "III": Table(
        "spike-based distillation and LaSNN",
        (
            Row(C10, "conv3_linear2", "spike_kd", 42.38, note=f"{CITED}; another network, other stages"),
            Row(C10, "conv3_linear2", "lasnn", 83.65, note=UNKNOWN_TEACHER),
            Row(C10, "vgg5", "lasnn", 86.68),
            Row(C10, "vgg9", "lasnn", 87.58),
        ),
        small=("conv3_linear2",),
    ),
    "IV": Table(
        "LaSNN with different teachers",
        (
            *_table_4("vgg5", 87.58, 82.53, (86.66, 86.68, 86.61)),
            *_table_4("vgg9", 88.84, 83.61, (87.57, 87.58, 87.55)),
            *_table_4("resnet12", 92.46, 84.82, (91.34, 90.90, 91.23)),
        ),
        small=("vgg5",),
    ),
    "Fig3": Table(
        "calibrated conversion and LaSNN (networks and numbers are not printed)",
        tuple(
            Row(C10, net, method, teacher=BEST_TEACHER.get(net, "densenet121"))
            for net in ("vgg5", "vgg9", "resnet12", "vgg16")
            for method in ("converted", "calibrated", "lasnn")
        ),
        small=("vgg5",),
    ),
    "Fig4": Table(
        "with and without layer-wise distillation",
        (
            *_figure_4(C10, "resnet12", 84.82, 90.70, 91.34, "densenet121"),
            *_figure_4(C100, "vgg7", None, 60.69, 61.52, "vgg16"),
            *_figure_4(TINY, "vgg16", None, 39.48, 47.44, "densenet121"),
        ),
        small=("resnet12",),
    ),
    "Fig5": Table(
        "attention from activations and from gradients",
        (*_figure_5("vgg5", 86.68), *_figure_5("vgg9", 87.58), *_figure_5("resnet12", 91.34)),
        small=("vgg5",),
    ),
    "Fig6": Table(
        "Poisson and direct input",
        (
            *_figure_6("vgg5", 86.68, 111.25, 88.55, 30),
            *_figure_6("vgg9", 87.58, 97.16, 89.66, 50),
            *_figure_6("resnet12", 91.34, 133.37, 90.56, 50),
        ),
        small=("vgg5",),
    ),
    "Fig7": Table(
        "mean spikes per convolutional layer (drawn, numbers not printed)",
        (
            Row(C100, "vgg7", "start", note="converted, at the thresholds of the trained ones"),
            Row(C100, "vgg7", "label_kd"),
            Row(C100, "vgg7", "lasnn"),
        ),
        small=("vgg7",),
    ),
    "1": Table(
        "sparse-KD",
        (
            *_sparse(C100, R18, 4, 70.30, {0: (70.30, 71.28), 0.1: (69.77, 71.90), 0.3: (69.54, 71.59),
                                           0.5: (69.20, 71.53), 0.7: (63.05, 71.36)}),
            *_sparse(C100, WRN, 4, 69.08, {0: (69.08, 69.44), 0.1: (68.20, 69.91), 0.3: (68.24, 69.72),
                                           0.5: (66.09, 69.90), 0.7: (50.09, 69.87)}),
            *_sparse(DVS, R18, 16, 95.13, {0: (95.13, 95.83), 0.1: (94.79, 95.83), 0.3: (94.79, 95.83),
                                           0.5: (88.54, 95.14), 0.7: (31.60, 96.18)}),
            *_sparse(DVS, WRN, 16, 94.44, {0: (94.44, 94.79), 0.1: (93.40, 95.48), 0.3: (90.62, 96.88),
                                           0.5: (74.31, 95.49), 0.7: (12.85, 94.79)}),
        ),
        small=(R18,),
    ),
    "2": Table(
        "teacher-default KD",
        (
            *_default(C100, R18, 4, 70.30, 71.20),
            *_default(C100, WRN, 4, 69.08, 70.68),
            *_default(C100, V16, 4, 65.49, 65.95),
            *_default(DVS, R18, 16, 95.13, 96.88),
            *_default(DVS, WRN, 16, 94.44, 96.18),
        ),
        small=(R18,),
    ),
    "3": Table(
        "the best of reverse distillation (other rows of the paper's table are other work)",
        (
            Row(C100, R18, "sparse 0.1", 71.90, 4, paper_teacher=69.77),
            Row(C100, R18, "default", 71.20, 4),
            Row(DVS, R18, "sparse 0.7", 96.18, 16, paper_teacher=31.60),
            Row(DVS, R18, "default", 96.88, 16),
        ),
        small=(R18,),
    ),
}  # fmt: skip
