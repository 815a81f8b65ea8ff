"""Files of a run folder: atomic writes that never follow links, and settings."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

PART = ".part"  # suffix of incomplete files
ABANDONED = 60.0  # seconds after which a file that is not whole has no writer any more
LISTED = 8  # differences of settings in a message


def write(path: Path, data: str | bytes) -> None:
    """Write a file atomically and flush it to disk.

    A link, pipe or device in its place is replaced, not followed; see :func:`inside` for links above it.

    Args:
        path: path in an existing folder.
        data: bytes, or text, written as UTF-8 with unchanged line ends.

    Raises:
        OSError: it could not be written, names the path; the file that was there is intact.
    """
    with named(path):
        descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
        try:
            with open(descriptor, "wb") as file:
                file.write(data.encode(errors="surrogateescape") if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(part, 0o644)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(part)
            raise
        flush(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let a system error name the file, which those of ``write`` and ``fsync`` do not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        OSError: it cannot be made, or nothing can be written there; the message names it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from error


def append(path: Path, text: str) -> None:
    """Append text to a file, created if missing, and flush it to disk; never through a link."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    with named(path), open(os.open(path, flags, 0o644), "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: object) -> None:
    """:func:`write` a value as JSON."""
    write(path, json.dumps(value, indent=1) + "\n")


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """:func:`write` rows as CSV."""
    write(path, as_csv(rows))


def as_csv(rows: Iterable[Iterable[object]]) -> str:
    """Format rows as CSV."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()


def remove_parts(folder: Path, age: float = 0.0) -> None:
    """Remove what a process left that was killed within :func:`write`.

    Args:
        folder: which may not be there.
        age: seconds without a change; 0 where nobody else writes, otherwise :data:`ABANDONED`.
    """
    for part in folder.glob(f".*{PART}"):
        with suppress(FileNotFoundError):
            about = part.lstat()
            if not stat.S_ISDIR(about.st_mode) and time.time() - about.st_mtime >= age:
                part.unlink()


def inside(folder: Path, name: str) -> Path:
    """Return ``folder / name``; refuse links that lead out of the folder.

    Raises:
        ValueError: the path lies outside the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link to {path.resolve()}, outside the run folder, and nothing is written there; "
            f"remove the link, or put the whole run folder elsewhere"
        )
    return path


def check_settings(path: Path, settings: Mapping[str, object]) -> None:
    """Write the settings of a new run folder, or compare them with those it was created with.

    Raises:
        ValueError: the settings differ (the message lists the differences), or the file is damaged.
    """
    there = read_settings(path)
    if there is None:
        write_json(path, settings)
    else:
        refuse_differences(path.parent, differences(there, settings))


def read_settings(path: Path) -> dict[str, object] | None:
    """Read the settings of a run folder; ``None`` for a new one.

    Raises:
        ValueError: the file is damaged, or a link that leads out of the folder.
    """
    inside(path.parent, path.name)
    if not path.exists():
        return None
    try:
        there = json.loads(read_regular(path, at_most=1 << 24))
        if not isinstance(there, dict):
            raise ValueError(f"it holds a {type(there).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as settings ({error}); use another run folder, or delete this one"
        ) from error
    return there


def differences(there: Mapping[str, object], here: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """List the differences of two nested mappings by dotted key; ``None`` for a missing value."""
    found: dict[str, tuple[object, object]] = {}
    here = json.loads(json.dumps(here))
    for key in dict.fromkeys((*there, *here)):
        one, other = there.get(key), here.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            found |= {f"{key}.{inner}": pair for inner, pair in differences(one, other).items()}
        elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            items = differences(*({str(n): item for n, item in enumerate(part)} for part in (one, other)))
            found |= {f"{key}.{inner}": pair for inner, pair in items.items()}
        elif one != other:
            found[key] = one, other
    return found


def refuse_differences(folder: Path, found: Mapping[str, tuple[object, object]]) -> None:
    """Raise :class:`ValueError` that lists :func:`differences`, if there are any."""
    if not found:
        return
    said = [f"{key}: there {_short(one)}, here {_short(other)}" for key, (one, other) in found.items()]
    more = f"; and {len(said) - LISTED} more" if len(said) > LISTED else ""
    raise ValueError(
        f"{folder} holds a run with other settings ({'; '.join(said[:LISTED])}{more}); "
        f"use another run folder, or delete this one"
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def read_json(path: Path, at_most: int = 1 << 26) -> dict[str, object] | None:
    """Read the object in a JSON file; ``None`` if it is missing or, with a warning, damaged."""
    if not os.path.lexists(path):
        return None
    try:
        found = json.loads(read_regular(path, at_most))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s is damaged (%s) and not used", path, error)
        return None
    return found


def read_regular(path: Path, at_most: int) -> bytes:
    """Read a regular file (not a link, device or pipe) of limited size."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is missing or not a regular file")
    size = path.stat().st_size
    if not isinstance(at_most, int) or size > at_most:
        raise ValueError(f"{path.name} has {size} bytes, more than the {at_most!r} it may have")
    return path.read_bytes()


def flush(path: Path) -> None:
    """Flush the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
