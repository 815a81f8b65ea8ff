"""Spiking neurons: SpikingJelly nodes over one time-loop operation.

This package knows nothing of the rest of ``lasnn_sj`` and can be used alone.
"""

from .backends import BackendChoice, backend, use_backend
from .nodes import IFNode, IntegratorNode, LIFNode, TimeLoopNode
from .surrogate import LinearSurrogate

__all__ = [
    "BackendChoice",
    "IFNode",
    "IntegratorNode",
    "LIFNode",
    "LinearSurrogate",
    "TimeLoopNode",
    "backend",
    "use_backend",
]
