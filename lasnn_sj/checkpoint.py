"""A run's folder: its settings, and its checkpoints, each complete and verified or not used at all."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import random
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

KEPT = 2
FORMAT = 2  # of checkpoints; to be raised when earlier ones cannot be gone on from
_WEIGHTS, _STATE, _MANIFEST = "student.safetensors", "state.pt", "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names it, why, and what would do."""


def save(folder: Path, number: int, weights: Mapping[str, Tensor], state: Mapping[str, object]) -> Path:
    """Write checkpoint ``number`` under ``folder`` and keep it and the one before.

    The files are written beside it, flushed to the disk and then renamed, so that a run killed meanwhile
    leaves the checkpoint before intact. A manifest holds every file's size and SHA-256. Checkpoints of
    higher numbers, which a run leaves that went back to an earlier one, are removed.

    Args:
        folder: where checkpoints of this run live.
        number: orders them, e.g. steps done.
        weights: tensors by name, as ``state_dict`` gives them.
        state: whatever else ``torch.load(weights_only=True)`` can read: numbers, strings, tensors and
            dicts, lists and tuples of them.

    Raises:
        CheckpointError: it could not be written (full disk, no right to write); what was there is intact.
    """
    final, part, old = (
        folder / f"{dot}{number:08d}{end}" for dot, end in (("", ""), (".", ".part"), (".", ".old"))
    )
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    try:  # or it would be found out only when the run has been killed
        torch.load(io.BytesIO(buffer.getbuffer()), weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"checkpoint {final} could not be read again and is not written ({_short(error)}); optimiser and "
            f"scheduler must keep numbers, strings, tensors, dicts, lists and tuples in their state_dict"
        ) from error
    # Bytes first: the writers of both formats hide the system's error.
    own = {name: unshared(tensor) for name, tensor in weights.items()}
    files = {_WEIGHTS: safetensors.torch.save(own), _STATE: buffer.getvalue()}
    sums = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    files[_MANIFEST] = json.dumps({"format": FORMAT, "files": sums}, indent=1).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in (*folder.glob(".*.part"), *folder.glob(".*.old")):  # of a run that was killed here
            shutil.rmtree(left)
        part.mkdir()
        for name, data in files.items():
            with open(part / name, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _flush(part)
        if final.exists():
            os.rename(final, old)
        os.rename(part, final)
        _flush(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if not final.exists() and old.exists():
            os.rename(old, final)
        there = _complete(folder)
        raise CheckpointError(
            f"checkpoint {final} could not be written ({error}); "
            + (f"the last one, {there[-1]}, is intact" if there else "there is none before it")
            + ". Make room there, or give the right to write, and start the same run again to go on"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    kept = [path for path in _complete(folder) if path.name <= final.name][-KEPT:]
    for path in _complete(folder):
        if path not in kept:
            shutil.rmtree(path)
    return final


def load_latest(
    folder: Path, device: torch.device | str = "cpu"
) -> tuple[Path, dict[str, Tensor], dict[str, object]] | None:
    """Path, weights and state of the newest checkpoint that is whole; ``None`` where there is none at all.

    A damaged one is reported by a warning and the one before is taken.

    Raises:
        CheckpointError: there are checkpoints and all are damaged. Nothing is changed.
    """
    wrong = []
    for path in reversed(_complete(folder)):
        try:
            weights, state = load(path, device)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        for message in wrong:
            log.warning("%s; going on from %s, the one before", message, path)
        return path, weights, state
    if wrong:
        raise CheckpointError(
            f"no checkpoint of {folder} can be used: {'; '.join(wrong)}. Nothing was changed; put a backup "
            f"there, or move the folder away to begin anew"
        )
    return None


def load(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights and state of a checkpoint; no code in it is run.

    Raises:
        CheckpointError: a file is missing, is a link, or is not what the manifest says.
    """
    try:
        manifest = json.loads(_regular(path / _MANIFEST, at_most=1 << 20))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"{_MANIFEST} is not of format {FORMAT}")
        files = {}
        for name in (_WEIGHTS, _STATE):
            said = manifest["files"][name]
            data = files[name] = _regular(path / name, at_most=said["bytes"])
            if len(data) != said["bytes"] or hashlib.sha256(data).hexdigest() != said["sha256"]:
                raise ValueError(f"{name} has {len(data)} bytes and is not what was written")
        with zipfile.ZipFile(io.BytesIO(files[_STATE])) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError(f"{_STATE} holds compressed data, which no checkpoint does")
        weights = safetensors.torch.load(files[_WEIGHTS])
        state = torch.load(io.BytesIO(files[_STATE]), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"{_STATE} holds a {type(state).__name__}, not a dict")
    except Exception as error:  # what is damaged raises every kind
        raise CheckpointError(f"checkpoint {path} is damaged ({_short(error)})") from error
    return {name: tensor.to(device) for name, tensor in weights.items()}, state


def unshared(tensor: Tensor) -> Tensor:
    """A copy as safetensors takes it: dense, on the CPU, of memory that no other tensor has."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


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
        there = json.loads(_regular(path, at_most=1 << 24))
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


def random_state() -> dict[str, object]:
    """State of Python's, NumPy's and PyTorch's random generators."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, object]) -> None:
    """Take back what :func:`random_state` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def generators_of(owners: Iterable[object]) -> list[torch.Generator]:
    """The random generators that these objects, or parts of these modules, have as ``generator``."""
    parts = (part for o in owners for part in (o.modules() if isinstance(o, nn.Module) else (o,)))
    found = (getattr(part, "generator", None) for part in parts)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's (all devices') random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.name.isdigit() and path.is_dir() and not path.is_symlink()
    )


def _regular(path: Path, at_most: int) -> bytes:
    """Content of a file that is no link, device or pipe, and not larger than it may be."""
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name} is not there as a file of its own")
    size = path.stat().st_size
    if not isinstance(at_most, int) or size > at_most:
        raise ValueError(f"{path.name} has {size} bytes, more than the {at_most!r} it may have")
    return path.read_bytes()


def _short(error: Exception) -> str:
    """PyTorch's errors go on for lines with advice to be less careful."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
