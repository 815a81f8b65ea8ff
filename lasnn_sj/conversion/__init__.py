"""ANN-to-SNN conversion, threshold balancing, calibration, pruning and NIR export."""

from .calibration import calibrate
from .convert import ConversionError, balance_thresholds, convert, scale_output
from .nir import ExportError
from .nir import save as export_nir
from .pruning import Sparsity, prune_magnitude, sparsity

__all__ = [
    "ConversionError",
    "ExportError",
    "Sparsity",
    "balance_thresholds",
    "calibrate",
    "convert",
    "export_nir",
    "prune_magnitude",
    "scale_output",
    "sparsity",
]
