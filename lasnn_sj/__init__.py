"""Layer-wise and reverse distillation of spiking neural networks, on top of SpikingJelly."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import analysis, conversion, data, distillation, experiments, models, neurons, training  # noqa: F401
    from .data import DirectEncoder, PoissonEncoder
    from .training import Callback, LaSNNTrainer

__version__ = "0.1.0"
__all__ = ["Callback", "DirectEncoder", "LaSNNTrainer", "PoissonEncoder", "models"]

_ROOMS = (
    "analysis", "conversion", "data", "distillation", "experiments", "models", "neurons", "runtime",
    "training",
)  # fmt: skip
_HOMES = {
    "Callback": "training",
    "DirectEncoder": "data",
    "LaSNNTrainer": "training",
    "PoissonEncoder": "data",
}


def __getattr__(name: str) -> object:
    """Import public names and subpackages on first use: the command line's help needs no torch."""
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS, "__version__"})
