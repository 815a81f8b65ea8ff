"""Trained students as folders: ``model.safetensors``, ``config.json`` and a model card."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from ..data.encoding import DirectEncoder, PoissonEncoder
from ..neurons import LIFNode, LinearSurrogate
from ..runtime.files import write
from .registry import create

FORMAT = 1  # of config.json; increase it when earlier folders can no longer be read
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_KEYS = {"format", "architecture", "encoder", "normalization", "neurons", "metrics", "training"}
_ENCODERS = {"DirectEncoder": DirectEncoder, "PoissonEncoder": PoissonEncoder}
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth", ".th"}
_EXTRA = "_extra_state"  # threshold and leak of a neuron, which are in config.json


class PretrainedError(ValueError):
    """A folder cannot be read or written as a trained student; the message names the file and the cause."""


def save_pretrained(
    student: nn.Module,
    encoder: nn.Module | None,
    folder: str | Path,
    *,
    mean: Sequence[float] = (0.5,),
    std: Sequence[float] = (0.5,),
    metrics: Mapping[str, float] | None = None,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Write a trained student for :func:`from_pretrained`, with a model card.

    Args:
        student: a network from a builder of :mod:`lasnn_sj.models`, or converted from one.
        encoder: a ``DirectEncoder`` or ``PoissonEncoder``; ``None`` for event frames.
        folder: created if missing; files of the same names are replaced.
        mean, std: normalization of the images, of pixels in [0, 1], one number or one per channel.
        metrics: results, for example ``{"top1": 91.3}``.
        training: facts about the training that JSON can hold, for example the data set, epochs, teacher.

    Returns:
        The folder.

    Raises:
        PretrainedError: a network that no builder builds or that was changed afterwards (pruning masks, half
            precision), another encoder or surrogate, or facts that JSON cannot hold.
    """
    architecture = getattr(student, "architecture", None)
    if architecture is None:
        raise PretrainedError(
            f"{type(student).__name__} was not built by a function of lasnn_sj.models, so it cannot be built "
            f"again by name; save its state_dict with safetensors instead"
        )
    if encoder is not None and type(encoder).__name__ not in _ENCODERS:
        raise PretrainedError(f"encoder must be one of {', '.join(_ENCODERS)}, got {type(encoder).__name__}")
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in student.state_dict().items()
        if not name.endswith(_EXTRA)
    }
    with torch.device("meta"):
        fresh = create(architecture["name"], **architecture["arguments"])
    _compare(fresh, _signatures(tensors), f"the network is not a plain {architecture['name']}")
    config = {
        "format": FORMAT,
        "architecture": architecture,
        "encoder": None if encoder is None else {"name": type(encoder).__name__, "T": encoder.T},
        "normalization": {"mean": list(mean), "std": list(std)},
        "neurons": {name: _describe(name, node) for name, node in _nodes(student).items()},
        "metrics": dict(metrics or {}),
        "training": dict(training or {}),
    }
    try:
        text = json.dumps(config, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise PretrainedError(f"metrics and training must hold what JSON can: {error}") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / WEIGHTS, safetensors.torch.save(tensors))
    write(folder / CONFIG, text)
    write(folder / CARD, _card(config))
    return folder


def from_pretrained(source: str | Path) -> tuple[nn.Module, nn.Module | None]:
    """Build a trained student and its encoder from a folder that :func:`save_pretrained` wrote.

    Nothing in the folder is executed. The network is built without memory first, and its tensors are compared
    with those of the file by name, shape and type before any is read.

    Args:
        source: the folder, or the ``.safetensors`` file in it.

    Returns:
        The network in evaluation mode and the encoder (``None`` for event frames). The attribute
        ``pretrained_config`` of the network is the content of ``config.json``.

    Raises:
        PretrainedError: a missing file, a pickle, another format version, an unknown architecture or encoder,
            a missing, extra or wrong-shaped tensor, or a threshold or leak out of range.
    """
    weights = _weights_file(Path(source))
    return _load(weights, weights.with_name(CONFIG))


def push_to_hub(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Upload a folder of :func:`save_pretrained` to the Hugging Face Hub.

    Args:
        folder: the folder; it is read by :func:`from_pretrained` first.
        repo_id: ``"owner/name"`` of the repository, which is created if missing.
        private: create a private repository.

    Returns:
        The address of the uploaded commit.

    Raises:
        ImportError: huggingface_hub is not installed.
        PretrainedError: the folder cannot be read.
    """
    from_pretrained(folder)
    api = _hub().HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(
        repo_id=repo_id, folder_path=str(folder), allow_patterns=[WEIGHTS, CONFIG, CARD]
    ))  # fmt: skip


def from_hub(repo_id: str, revision: str | None = None) -> tuple[nn.Module, nn.Module | None]:
    """Download a trained student from the Hugging Face Hub; see :func:`from_pretrained`.

    Args:
        repo_id: ``"owner/name"`` of the repository.
        revision: branch, tag or commit.
    """
    hub = _hub()
    config, weights = (
        Path(hub.hf_hub_download(repo_id, name, revision=revision)) for name in (CONFIG, WEIGHTS)
    )
    return _load(weights, config)


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the Hub needs huggingface_hub: pip install 'lasnn-sj[hub]'") from error
    return huggingface_hub


def _weights_file(source: Path) -> Path:
    if source.is_dir():
        if not (source / WEIGHTS).exists():
            pickles = sorted(path.name for path in source.iterdir() if path.suffix in _PICKLES)
            hint = f"; {pickles[0]} is a pickle, which can execute code and is not read" if pickles else ""
            raise PretrainedError(f"{source} has no {WEIGHTS}{hint}")
        source = source / WEIGHTS
    if source.suffix in _PICKLES:
        raise PretrainedError(
            f"{source} is a pickle, which can execute code and is not read; use safetensors"
        )
    if not source.is_file():
        raise PretrainedError(f"{source} does not exist as a file or folder")
    return source


def _load(weights: Path, config_path: Path) -> tuple[nn.Module, nn.Module | None]:
    config = _read_config(config_path)
    encoder = _read_encoder(config["encoder"], config_path)
    name, arguments = config["architecture"]["name"], config["architecture"]["arguments"]
    try:
        with torch.device("meta"):
            net = create(name, **arguments)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise PretrainedError(f"{config_path}: architecture: {error}") from error
    try:
        with safetensors.safe_open(weights, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            found = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
            _compare(net, found, str(weights))
            tensors = {key: file.get_tensor(key) for key in slices}
    except (safetensors.SafetensorError, OSError) as error:
        with open(weights, "rb") as start:
            pickle = start.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        why = "is a pickle, which can execute code and is not read" if pickle else f"is damaged ({error})"
        raise PretrainedError(f"{weights} {why}") from error
    _set_neurons(net, config["neurons"], config_path)
    extras = {key: value for key, value in net.state_dict().items() if key.endswith(_EXTRA)}
    net.load_state_dict(tensors | extras, assign=True)
    net.pretrained_config = config
    functional.reset_net(net)
    return net.eval(), encoder


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > 1 << 20:
            raise ValueError("it has more than 1 MiB")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PretrainedError(f"{path} cannot be read: {error}") from error
    version = config.get("format") if isinstance(config, dict) else None
    if version != FORMAT:
        raise PretrainedError(
            f"{path} has format {version!r}, this version of lasnn_sj reads format {FORMAT}"
        )
    for what, keys in (("misses", _KEYS - config.keys()), ("has unknown", config.keys() - _KEYS)):
        if keys:
            raise PretrainedError(f"{path} {what} keys: {', '.join(sorted(map(repr, keys)))}")
    for key, inner in (("architecture", {"name", "arguments"}), ("normalization", {"mean", "std"})):
        if not (isinstance(config[key], dict) and config[key].keys() == inner):
            raise PretrainedError(
                f"{path}: {key} must hold {' and '.join(sorted(inner))}, got {config[key]!r}"
            )
    if not isinstance(config["architecture"]["arguments"], dict):
        raise PretrainedError(f"{path}: the architecture's arguments must be names and values")
    return config


def _read_encoder(said: object, path: Path) -> nn.Module | None:
    if said is None:
        return None
    if not (isinstance(said, dict) and said.keys() == {"name", "T"} and str(said["name"]) in _ENCODERS):
        known = " or ".join(_ENCODERS)
        raise PretrainedError(f"{path}: encoder must be null, or a name ({known}) and T; got {said!r}")
    try:
        return _ENCODERS[str(said["name"])](said["T"])
    except ValueError as error:
        raise PretrainedError(f"{path}: encoder: {error}") from error


def _signatures(tensors: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and safetensors' type name of each tensor."""
    names = {torch.float32: "F32", torch.int64: "I64"}
    return {key: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for key, t in tensors.items()}


def _compare(net: nn.Module, found: Mapping[str, tuple[tuple[int, ...], str]], where: str) -> None:
    """Raise where the tensors of a file are not those of the network."""
    wanted = _signatures({key: t for key, t in net.state_dict().items() if not key.endswith(_EXTRA)})
    for what, keys in (("misses", wanted.keys() - found.keys()), ("has extra", found.keys() - wanted.keys())):
        if keys:
            more = f" and {len(keys) - 3} more" * (len(keys) > 3)
            raise PretrainedError(f"{where}: it {what} tensors {', '.join(sorted(keys)[:3])}{more}")
    for key, want in wanted.items():
        if found[key] != want:
            raise PretrainedError(f"{where}: tensor {key} is {found[key]}, the network's is {want}")


def _nodes(net: nn.Module) -> dict[str, neuron.BaseNode]:
    return {name: m for name, m in net.named_modules() if isinstance(m, neuron.BaseNode)}


def _describe(name: str, node: neuron.BaseNode) -> dict[str, float]:
    """Return what of a neuron its network's builder does not determine."""
    if not isinstance(node, LIFNode):
        return {"v_threshold": node.v_threshold}
    if not isinstance(node.surrogate_function, LinearSurrogate):
        raise PretrainedError(
            f"neuron '{name}' has surrogate {type(node.surrogate_function).__name__}; only LinearSurrogate "
            f"can be saved"
        )
    return {"v_threshold": node.v_threshold, "leak": node.leak, "gamma": node.surrogate_function.alpha}


def _set_neurons(net: nn.Module, said: object, path: Path) -> None:
    nodes = _nodes(net)
    if not isinstance(said, dict) or said.keys() != nodes.keys():
        names = said.keys() if isinstance(said, dict) else set()
        other = sorted(names ^ nodes.keys())[:3]
        raise PretrainedError(f"{path}: neurons are not those of the network; they differ in {other}")
    for name, node in nodes.items():
        values, own = said[name], _describe(name, node)
        if not isinstance(values, dict) or values.keys() != own.keys():
            raise PretrainedError(f"{path}: neuron '{name}' must have {', '.join(own)}, got {values!r}")
        for key, value in values.items():
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not (number and (0 <= value <= 1 if key == "leak" else value > 0)):
                raise PretrainedError(f"{path}: neuron '{name}': {key} is {value!r}, out of range")
        node.v_threshold = float(values["v_threshold"])
        if "leak" in values:
            node.leak = float(values["leak"])
            node.surrogate_function = LinearSurrogate(float(values["gamma"]))


def _card(config: Mapping[str, Any]) -> str:
    """Return the model card in Markdown, with the Hub's metadata."""
    architecture, encoder = config["architecture"], config["encoder"]
    arguments = ", ".join(f"{key}={value!r}" for key, value in architecture["arguments"].items())
    code = "from events, without an encoder" if encoder is None else f"`{encoder['name']}(T={encoder['T']})`"
    mean, std = config["normalization"]["mean"], config["normalization"]["std"]
    lines = [
        "---", "library_name: lasnn_sj", "tags:", "- spiking-neural-network", "- spikingjelly", "---", "",
        f"# {architecture['name']}", "",
        f"A spiking neural network: `models.create({architecture['name']!r}, {arguments})`.", "",
        f"- Input code: {code}",
        f"- Pixels in [0, 1], normalized by mean {mean} and deviation {std}",
        "", "```python", "from lasnn_sj import models", "",
        'student, encoder = models.from_pretrained("path/to/this/folder")', "```",
    ]  # fmt: skip
    for title in ("metrics", "training"):
        if config[title]:
            lines += ["", f"## {title.capitalize()}", "", "| | |", "|---|---|"]
            lines += [f"| {key} | {value} |" for key, value in config[title].items()]
    return "\n".join(lines) + "\n"
