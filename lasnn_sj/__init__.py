"""Layer-wise and reverse distillation of spiking neural networks, on top of SpikingJelly."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import models
    from .callbacks import Callback
    from .encoding import DirectEncoder, PoissonEncoder
    from .trainer import LaSNNTrainer

__version__ = "0.1.0"
__all__ = ["Callback", "DirectEncoder", "LaSNNTrainer", "PoissonEncoder", "models"]


def __getattr__(name: str) -> object:
    """Public names when they are first used: the command line's help needs no torch."""
    homes = {
        "Callback": "callbacks",
        "DirectEncoder": "encoding",
        "PoissonEncoder": "encoding",
        "LaSNNTrainer": "trainer",
    }
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "models":
        return import_module(".models", __name__)
    return getattr(import_module(f".{homes[name]}", __name__), name)
