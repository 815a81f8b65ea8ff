"""Distillation: objectives, attention maps, and the taps that read layers."""

from .attention import (
    Attention,
    activation_map,
    attention_loss,
    gradient_map,
    spike_activation_map,
    spike_map,
)
from .logits import DefaultKD, LabelKD, SparseKD, default_kd, sparse_kd
from .objective import CrossEntropy, Look, Needs, Objective, Signals, Sum, weight_at
from .objective import parse_objective as _parse
from .pairs import Pair, as_map, choose_layers, choose_pairs
from .spikes import SpikeKD
from .taps import StudentTaps, TapError, TeacherTaps
from .teacher import TeacherForward

__all__ = [
    "Attention",
    "CrossEntropy",
    "DefaultKD",
    "LabelKD",
    "Look",
    "Needs",
    "Objective",
    "Pair",
    "Signals",
    "SparseKD",
    "SpikeKD",
    "StudentTaps",
    "Sum",
    "TapError",
    "TeacherForward",
    "TeacherTaps",
    "activation_map",
    "as_map",
    "attention_loss",
    "choose_layers",
    "choose_pairs",
    "default_kd",
    "gradient_map",
    "parse_objective",
    "sparse_kd",
    "spike_activation_map",
    "spike_map",
    "weight_at",
]


def parse_objective(text: str) -> Objective:
    """Build an objective from text such as ``"LabelKD(alpha=0.5) + Attention('gradient')"``.

    The classes of this package whose arguments are numbers and texts are known.

    Raises:
        ValueError: anything else; no code is run.
    """
    known = (Attention, CrossEntropy, DefaultKD, LabelKD)
    return _parse(text, {one.__name__: one for one in known})
