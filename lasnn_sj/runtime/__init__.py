"""Helpers that every other package may use: processes, files, random-number state, cost."""

from .cost import Cost
from .files import check_settings
from .locks import FolderLock, LockError
from .random_state import seed_everything

__all__ = ["Cost", "FolderLock", "LockError", "check_settings", "seed_everything"]
