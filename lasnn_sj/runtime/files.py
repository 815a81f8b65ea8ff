"""Files of a run folder: written whole or not at all, never through links; and its settings."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all; a link in its place is replaced, not followed.

    Raises:
        OSError: as ``open`` does; the file that was there is intact.
    """
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with open(descriptor, "w", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def inside(folder: Path, name: str) -> Path:
    """``folder / name``, refused where links lead out of the folder.

    Raises:
        ValueError: it is elsewhere.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside the run folder, and nothing is written there; "
            f"remove the link, or put the whole run folder elsewhere"
        )
    return path


def check_settings(path: Path, settings: dict[str, object]) -> None:
    """Write the settings of a new run folder, or hold them against those it was made with.

    Raises:
        ValueError: they differ, the message lists how; or the file is damaged.
    """
    settings = json.loads(json.dumps(settings))
    inside(path.parent, path.name)
    if not path.exists():
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        there = json.loads(read_regular(path, at_most=1 << 24))
        if not isinstance(there, dict):
            raise ValueError(f"it holds a {type(there).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as settings ({error}); use another run folder, or delete this one"
        ) from error
    other = [
        f"{key}: there {there.get(key)!r}, here {settings.get(key)!r}"
        for key in sorted(there.keys() | settings.keys())
        if there.get(key) != settings.get(key)
    ]
    if other:
        raise ValueError(
            f"{path.parent} holds a run with other settings ({'; '.join(other)}); "
            f"use another run folder, or delete this one"
        )


def read_regular(path: Path, at_most: int) -> bytes:
    """Content of a file that is no link, device or pipe, and not larger than it may be."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is not there as a file of its own")
    size = path.stat().st_size
    if not isinstance(at_most, int) or size > at_most:
        raise ValueError(f"{path.name} has {size} bytes, more than the {at_most!r} it may have")
    return path.read_bytes()


def flush(path: Path) -> None:
    """Flush a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
