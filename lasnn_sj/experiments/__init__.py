"""The papers' tables and figures, each from one command."""

from .run import ExperimentError, reproduce
from .tables import TABLES, Row, Table

__all__ = ["TABLES", "ExperimentError", "Row", "Table", "reproduce"]
