"""Distillation objectives, attention maps, and the taps that read layers."""

from .attention import activation_map, gradient_map, spike_activation_map, spike_map
from .objectives import (
    CrossEntropy,
    DefaultKD,
    LabelKD,
    Objective,
    Signals,
    SparseKD,
    SpikeKD,
    attention_loss,
    default_kd,
    sparse_kd,
)
from .taps import Pair, TapError, choose_layers, choose_pairs

__all__ = [
    "CrossEntropy",
    "DefaultKD",
    "LabelKD",
    "Objective",
    "Pair",
    "Signals",
    "SparseKD",
    "SpikeKD",
    "TapError",
    "activation_map",
    "attention_loss",
    "choose_layers",
    "choose_pairs",
    "default_kd",
    "gradient_map",
    "sparse_kd",
    "spike_activation_map",
    "spike_map",
]
