"""The stages of both papers, their tables and figures, and runs from configuration files."""

from .pipeline import Pipeline, Recipe
from .reverse import Study
from .run import ExperimentError, reproduce
from .tables import TABLES, Row, Table

__all__ = ["TABLES", "ExperimentError", "Pipeline", "Recipe", "Row", "Study", "Table", "reproduce"]
