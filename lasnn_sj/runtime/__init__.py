"""Helpers that every other package may use: processes, files, random-number state, cost."""

from .cost import Cost
from .files import check_settings, write_text
from .random_state import seed_everything

__all__ = ["Cost", "check_settings", "seed_everything", "write_text"]
