"""Checkpoints of a run, each complete and verified or not used at all."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..runtime.files import flush, read_regular, write

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
        flush(part)
        if final.exists():
            os.rename(final, old)
        os.rename(part, final)
        flush(folder)
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
        manifest = json.loads(read_regular(path / _MANIFEST, at_most=1 << 20))
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ValueError(f"{_MANIFEST} is not of format {FORMAT}")
        files = {}
        for name in (_WEIGHTS, _STATE):
            said = manifest["files"][name]
            data = files[name] = read_regular(path / name, at_most=said["bytes"])
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


def save_weights(path: Path, net: nn.Module) -> None:
    """Write a network's weights as a safetensors file, whole or not at all.

    Raises:
        OSError: it could not be written; the file that was there is intact.
    """
    write(path, safetensors.torch.save({n: unshared(tensor) for n, tensor in net.state_dict().items()}))


def load_weights(path: str | Path, net: nn.Module) -> nn.Module:
    """Give a network the weights of a run: ``weights.safetensors`` or ``best.safetensors`` of its folder.

    Args:
        path: the file.
        net: a network of the same architecture; thresholds and leaks come with the weights.

    Returns:
        The network.

    Raises:
        CheckpointError: the file is missing, damaged, or another network's.
    """
    try:
        net.load_state_dict(safetensors.torch.load(read_regular(Path(path), at_most=1 << 40)))
    except Exception as error:  # what is damaged raises every kind
        raise CheckpointError(f"weights {path} cannot be used ({_short(error)})") from error
    return net


def unshared(tensor: Tensor) -> Tensor:
    """A copy as safetensors takes it: dense, on the CPU, of memory that no other tensor has."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.isascii() and path.name.isdigit() and path.is_dir() and not path.is_symlink()
    )


def _short(error: Exception) -> str:
    """PyTorch's errors go on for lines with advice to be less careful."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
