"""Spiking neurons: SpikingJelly nodes over one time-loop operation.

This package knows nothing of the rest of ``lasnn_sj`` and can be used alone.
"""

from .accelerate import AccelerationReport, accelerate, acceleration_report
from .backends import BackendChoice, backend, use_backend
from .memory import keep_freed_memory
from .nodes import IFNode, IntegratorNode, LIFNode, TimeLoopNode
from .surrogate import LinearSurrogate

__all__ = [
    "AccelerationReport",
    "BackendChoice",
    "IFNode",
    "IntegratorNode",
    "LIFNode",
    "LinearSurrogate",
    "TimeLoopNode",
    "accelerate",
    "acceleration_report",
    "backend",
    "keep_freed_memory",
    "use_backend",
]
