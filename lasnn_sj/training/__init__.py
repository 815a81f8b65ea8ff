"""Training and evaluation of students."""

from ..models.readout import BatchError
from .callbacks import Callback, TensorBoard
from .checkpoint import CheckpointError
from .evaluation import accuracy_over_time, evaluate
from .nonfinite import NonFiniteError
from .trainer import LaSNNTrainer

__all__ = [
    "BatchError",
    "Callback",
    "CheckpointError",
    "LaSNNTrainer",
    "NonFiniteError",
    "TensorBoard",
    "accuracy_over_time",
    "evaluate",
]
