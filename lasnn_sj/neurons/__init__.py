"""Spiking neurons: SpikingJelly nodes over one time-loop operation.

This package knows nothing of the rest of ``lasnn_sj`` and can be used alone.
"""

from .nodes import IFNode, IntegratorNode, LIFNode, TimeLoopNode
from .surrogate import LinearSurrogate

__all__ = ["IFNode", "IntegratorNode", "LIFNode", "LinearSurrogate", "TimeLoopNode"]
