"""Layer-wise and reverse distillation of spiking neural networks, on top of SpikingJelly."""

from . import models
from .encoding import DirectEncoder, PoissonEncoder
from .trainer import LaSNNTrainer

__version__ = "0.1.0"
__all__ = ["DirectEncoder", "LaSNNTrainer", "PoissonEncoder", "models"]
