"""Analysis of trained students: spikes, operations and energy, attention maps, reports."""

from . import plots
from .energy import Operations, count_operations
from .inspection import inspect, inspect_student
from .report import report as write_report
from .spikes import SpikeStatistics, Traces, record_traces, spike_statistics

__all__ = [
    "Operations",
    "SpikeStatistics",
    "Traces",
    "count_operations",
    "inspect",
    "inspect_student",
    "plots",
    "record_traces",
    "spike_statistics",
    "write_report",
]
