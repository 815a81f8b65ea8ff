"""Training and evaluation of students."""

from ..models.readout import BatchError
from .callbacks import Callback, TensorBoard
from .checkpoint import CheckpointError, load_weights
from .evaluation import accuracy_over_time, evaluate
from .lasnn import LaSNNTrainer
from .nonfinite import NonFiniteError
from .options import TrainingOptions
from .trainer import Trainer

__all__ = [
    "BatchError",
    "Callback",
    "CheckpointError",
    "LaSNNTrainer",
    "NonFiniteError",
    "TensorBoard",
    "Trainer",
    "TrainingOptions",
    "accuracy_over_time",
    "evaluate",
    "load_weights",
]
