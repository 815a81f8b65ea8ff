"""Spiking neurons: SpikingJelly nodes over one time-loop operation.

This package imports nothing from the rest of ``lasnn_sj`` and can be used alone.
"""

from .accelerate import AccelerationReport, accelerate, acceleration_report
from .backends import BackendChoice, backend, use_backend
from .convolution import Conv2d
from .linear import Linear
from .memory import disable_malloc_trim
from .nodes import IFNode, IntegratorNode, LIFNode, TimeLoopNode
from .sequential import Sequential
from .surrogate import LinearSurrogate

__all__ = [
    "AccelerationReport",
    "BackendChoice",
    "Conv2d",
    "IFNode",
    "IntegratorNode",
    "LIFNode",
    "Linear",
    "LinearSurrogate",
    "Sequential",
    "TimeLoopNode",
    "accelerate",
    "acceleration_report",
    "backend",
    "disable_malloc_trim",
    "use_backend",
]
