"""Distillation: objectives, attention maps, and the taps that read layers."""

from inspect import signature

from .attention import (
    Attention,
    activation_map,
    attention_loss,
    gradient_map,
    spike_activation_map,
    spike_map,
)
from .classifiers import SAMD, EnOF, StableNoise
from .features import BKD, KDSNN, RelationalKD, StableSpike
from .learned_pairs import SASTC
from .logits import DIST, DecoupledKD, DefaultKD, LabelKD, NoiseSmoothedKD, SparseKD, default_kd, sparse_kd
from .objective import CrossEntropy, Look, Needs, Objective, Signals, Sum, weight_at
from .objective import parse_objective as _parse
from .pairs import Pair, as_map, choose_layers, choose_pairs
from .spikes import SpikeKD
from .taps import StudentTaps, TapError, TeacherTaps
from .teacher import TeacherForward
from .temporal import (
    TET,
    TKS,
    TPD,
    EntropyRegularization,
    PerStepCE,
    SeAlKD,
    Synergy,
    TemporalKD,
    step_logits,
)

__all__ = [
    "BKD",
    "DIST",
    "KDSNN",
    "SAMD",
    "SASTC",
    "TET",
    "TKS",
    "TPD",
    "Attention",
    "CrossEntropy",
    "DecoupledKD",
    "DefaultKD",
    "EnOF",
    "EntropyRegularization",
    "LabelKD",
    "Look",
    "Needs",
    "NoiseSmoothedKD",
    "Objective",
    "Pair",
    "PerStepCE",
    "RelationalKD",
    "SeAlKD",
    "Signals",
    "SparseKD",
    "SpikeKD",
    "StableNoise",
    "StableSpike",
    "StudentTaps",
    "Sum",
    "Synergy",
    "TapError",
    "TeacherForward",
    "TeacherTaps",
    "TemporalKD",
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
    "step_logits",
    "weight_at",
]


def parse_objective(text: str) -> Objective:
    """Build an objective from text such as ``"LabelKD(alpha=0.5) + Attention('gradient')"``.

    The classes of this package whose arguments are numbers and texts are known.

    Raises:
        ValueError: anything else; no code is run.
    """
    kinds = [one for one in (globals()[name] for name in __all__) if isinstance(one, type)]
    objectives = [one for one in kinds if issubclass(one, Objective) and one not in (Objective, Sum)]
    known = [one for one in objectives if "teacher" not in signature(one).parameters]
    return _parse(text, {one.__name__: one for one in known})
