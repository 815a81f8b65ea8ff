"""The stages of both papers, their tables and figures, and runs from configuration files."""

from .cluster import Cluster, ClusterError
from .compare import Comparison
from .pipeline import Pipeline
from .recipes import Recipe, ReverseRecipe, rathi
from .reverse import ReversePipeline
from .run import ExperimentError, reproduce
from .tables import TABLES, Row, Table

__all__ = [
    "TABLES",
    "Cluster",
    "ClusterError",
    "Comparison",
    "ExperimentError",
    "Pipeline",
    "Recipe",
    "ReversePipeline",
    "ReverseRecipe",
    "Row",
    "Table",
    "rathi",
    "reproduce",
]
