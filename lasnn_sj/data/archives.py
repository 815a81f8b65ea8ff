"""Reading of untrusted NumPy archives: headers, sizes and checksums are verified first."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DENSEST = 1040  # largest ratio of decompressed to compressed bytes of deflate


class ArchiveError(ValueError):
    """An ``.npz`` file cannot be used; the message gives the cause."""


def read_npz(
    path: Path, names: Sequence[str] | None = None, at_most: int | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read named arrays of an ``.npz`` file; also returns the names of all arrays that it has.

    Shapes, sizes and checksums are compared before memory is allocated, so that its amount follows the size
    of the file and not the sizes that it declares. Pickles are not read.

    Args:
        path: path of a regular file.
        names: names of the arrays to read, if present; all if not given.
        at_most: largest number of bytes of the arrays; this machine's memory if not given.

    Raises:
        ArchiveError: the file is damaged, or declares more than it holds or than this machine has memory.
        OSError: it cannot be opened.
    """
    try:
        if not path.is_file():  # opening a pipe would block
            raise FileNotFoundError(f"{path} is not a regular file")
        size = path.stat().st_size
        limit = _memory() if at_most is None else at_most
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            if len(entries) < len(archive.infolist()):
                raise ValueError("two of its entries have one name")
            names, declared = list(entries) if names is None else names, 0
            for name in names:
                if name in entries:
                    declared += _declared(archive, entries[name], size)
            if declared > limit:
                what = (
                    "memory than there is" if at_most is None else f"than the {limit / 2**30:.1f} it may have"
                )
                raise ValueError(f"its arrays take {declared / 2**30:.1f} GiB, more {what}")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names if name in entries}, list(entries)
    except OSError:
        raise
    except Exception as error:  # damaged files raise exceptions of many types
        raise ArchiveError(f"{path} cannot be read as an .npz file ({error})") from error


def _declared(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file_size: int) -> int:
    """Return the bytes of an array according to its header."""
    if entry.compress_size > file_size or entry.file_size > DENSEST * (entry.compress_size + 1):
        raise ValueError(f"{entry.filename} declares {entry.file_size} bytes, which cannot be in the file")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{entry.filename} is of the unknown version {version}")
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    wanted = math.prod(shape) * dtype.itemsize
    if dtype.hasobject or any(n < 0 for n in shape) or wanted > entry.file_size:
        raise ValueError(f"{entry.filename} declares an array {shape} of {dtype}, which it does not hold")
    return wanted


def _memory() -> int:
    """Return the bytes of this machine's memory; infinity if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**63
