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
FORMAT = 2  # of checkpoints; raise it when runs can no longer resume from earlier ones
_WEIGHTS, _STATE, _MANIFEST = "student.safetensors", "state.pt", "manifest.json"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written; the message names the file, the cause and a remedy."""


def save(folder: Path, number: int, weights: Mapping[str, Tensor], state: Mapping[str, object]) -> Path:
    """Write checkpoint ``number`` under ``folder`` and keep it and the one before.

    The files are written to a temporary folder, flushed to disk and renamed, so that the previous checkpoint
    stays intact if the process is killed meanwhile. A manifest holds the size and SHA-256 of every file.
    Checkpoints with higher numbers, left by a run that resumed from an earlier one, are removed.

    Args:
        folder: folder of the run's checkpoints.
        number: order of the checkpoints, for example the number of steps.
        weights: tensors by name, as ``state_dict`` gives them.
        state: further values that ``torch.load(weights_only=True)`` can read: numbers, strings, tensors,
            and dicts, lists and tuples of these.

    Raises:
        CheckpointError: the checkpoint cannot be written (disk full, no write permission); earlier ones are
            intact.
    """
    final, part, old = (
        folder / f"{dot}{number:08d}{end}" for dot, end in (("", ""), (".", ".part"), (".", ".old"))
    )
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    try:  # a state that cannot be read would otherwise be noticed only when resuming
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
            + ". Free some space or check write permission, then start the same run again to resume"
        ) from error
    shutil.rmtree(old, ignore_errors=True)
    kept = [path for path in _complete(folder) if path.name <= final.name][-KEPT:]
    for path in _complete(folder):
        if path not in kept:
            try:
                shutil.rmtree(path)
            except OSError as error:  # the new one is whole; the next tries again
                log.warning("the older checkpoint %s could not be removed (%s)", path, error)
    return final


def load_latest(
    folder: Path, device: torch.device | str = "cpu"
) -> tuple[Path, dict[str, Tensor], dict[str, object]] | None:
    """Load path, weights and state of the newest intact checkpoint; ``None`` if there are no checkpoints.

    A damaged checkpoint is skipped with a warning.

    Raises:
        CheckpointError: there are checkpoints and all are damaged. No file is changed.
    """
    wrong = []
    for path in reversed(_complete(folder)):
        try:
            weights, state = load(path, device)
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        for message in wrong:
            log.warning("%s; resuming from %s, the one before", message, path)
        return path, weights, state
    if wrong:
        raise CheckpointError(
            f"no checkpoint of {folder} can be used: {'; '.join(wrong)}. No file was changed; restore a "
            f"backup there, or move the folder away to start again"
        )
    return None


def load(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, object]]:
    """Load weights and state of a checkpoint without running code from it.

    Raises:
        CheckpointError: a file is missing, is a link, or differs from the manifest.
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
    except Exception as error:  # damaged files raise exceptions of many types
        raise CheckpointError(f"checkpoint {path} is damaged ({_short(error)})") from error
    return {name: tensor.to(device) for name, tensor in weights.items()}, state


def save_weights(path: Path, net: nn.Module) -> None:
    """Write a network's weights as a safetensors file, atomically.

    Raises:
        OSError: the file cannot be written; an existing file is intact.
    """
    write(path, safetensors.torch.save({n: unshared(tensor) for n, tensor in net.state_dict().items()}))


def load_weights(path: str | Path, net: nn.Module) -> nn.Module:
    """Load ``weights.safetensors`` or ``best.safetensors`` of a run folder into a network.

    Args:
        path: the file.
        net: a network of the same architecture; thresholds and leaks come with the weights.

    Returns:
        The network.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network.
    """
    try:
        net.load_state_dict(safetensors.torch.load(read_regular(Path(path), at_most=1 << 40)))
    except Exception as error:  # damaged files raise exceptions of many types
        raise CheckpointError(f"weights {path} cannot be used ({_short(error)})") from error
    return net


def unshared(tensor: Tensor) -> Tensor:
    """Return a dense copy on the CPU that shares no memory with other tensors, as safetensors requires."""
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
    """Return the first line of an error; PyTorch's continue with advice to allow unsafe loading."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
