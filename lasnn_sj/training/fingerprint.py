"""Fingerprints of a run's networks, data and optimizer, as ``settings.json`` holds them."""

from __future__ import annotations

import functools
import hashlib
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, IterableDataset, Subset

from ..distillation.features import LateWeights
from ..distillation.objective import Sum
from ..runtime import distributed, random_state
from .options import TrainingOptions

if TYPE_CHECKING:
    from .trainer import Trainer

SAMPLED = 4  # items of a data set that are hashed
DEEPEST = 8
# Attributes of schedulers that change during training.
_MOVING = {
    "last_epoch",
    "best",
    "num_bad_epochs",
    "cooldown_counter",
    "T_cur",
    "T_i",
    "optimizer",
    "mode_worse",
}
_STATE = {"training", "v_seq"}  # attributes of layers that a forward pass changes
_SETTINGS = (bool, int, float, str, tuple, type(None))


def run(trainer: Trainer, train_loader: Iterable) -> dict[str, object]:
    """Describe everything that a resumed run must share with the original run, by name."""
    generators = random_state.generators_of({"data": getattr(train_loader, "dataset", None)})
    teacher = trainer.teacher
    return {
        "student": network(trainer.student),
        "teacher": None if teacher is None else network(teacher, layers=False),
        "encoder": describe(trainer.encoder),
        "objective": describe(trainer.objective),
        "optimizer": optimiser(trainer.optimizer),
        "scheduler": schedule(trainer.scheduler),
        "data": data(train_loader, generators),
        "process_seed": torch.initial_seed(),
    }


def settings(trainer: Trainer) -> dict[str, object]:
    """Return the readable settings of a run; a resumed run must share them."""
    group = {k: v for k, v in trainer.optimizer.defaults.items() if isinstance(v, (int, float, bool, tuple))}
    group.pop("fused", None)  # changes the implementation, not the result
    options, defaults = trainer.options, TrainingOptions()
    later = {
        name: getattr(options, name)
        for name in ("precision", "accumulate", "time_chunks", "clip_norm", "on_nonfinite", "keep_best")
        if getattr(options, name) != getattr(defaults, name)
    }
    if options.keep_best:
        later["monitor"] = options.monitor
    if distributed.world_size() > 1:
        later["processes"] = distributed.world_size()
    return {
        "student": type(trainer.student).__name__,
        "architecture": describe(getattr(trainer.student, "architecture", None)),
        "parameters": sum(p.numel() for p in trainer.student.parameters()),
        "encoder": repr(trainer.encoder),
        "objective": sentence(trainer.objective),
        "readout": trainer.readout,
        "optimizer": type(trainer.optimizer).__name__,
        "hyperparameters": json.loads(json.dumps(group)),
        "seed": trainer.seed,
    } | later


def network(module: nn.Module, *, layers: bool = True, initial: bool = True) -> dict[str, object]:
    """Describe a network: class, layers with their settings (thresholds, leaks, surrogates), weights.

    Args:
        module: any network.
        layers: list the settings of each layer; if false, a digest of all of them.
        initial: include all weights; if false, only those that are not trained.
    """
    each = {name or "(itself)": _layer(part) for name, part in module.named_modules()}
    tensors = {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if isinstance(tensor, Tensor) and (initial or not tensor.requires_grad)
    }
    return {
        "class": type(module).__name__,
        "parameters": sum(p.numel() for p in module.parameters()),
        "layers": each if layers else _digest(repr(each).encode()),
        "weights": weights(tensors),
    }


def weights(tensors: Mapping[str, Tensor]) -> str:
    """Compute a digest of named tensors: names, dtypes, shapes, values (about 0.1 s for 50 MB)."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy() if data.numel() else b"")
    return digest.hexdigest()


def data(loader: Iterable, generators: Mapping[str, random_state.Generator]) -> dict[str, object]:
    """Describe a loader: batch size and order; class, size, labels and a few items of its data set.

    Items are read with seeded random-number generators, whose states are restored, so that augmented items
    are the same each time. Of a stream only the class is described, because reading would consume it.

    Args:
        loader: as for training.
        generators: that its data set holds.
    """
    source = getattr(loader, "dataset", None)
    said: dict[str, object] = {"loader": type(loader).__name__}
    if isinstance(loader, DataLoader):
        batches = loader.batch_sampler
        said |= {
            "batch_size": loader.batch_size or getattr(batches, "batch_size", None),
            "drop_last": loader.drop_last,
            "sampler": type(loader.sampler if loader.batch_size else batches).__name__,
        }
    if isinstance(loader, Sequence):
        source = loader
    if source is None:  # such as a DeviceLoader, which has its images itself
        own = {name: getattr(loader, name, None) for name in ("images", "labels")}
        whole = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
        said |= {
            "batch_size": getattr(loader, "batch_size", None),
            "samples": _length(whole.get("labels", ())),
        }
        return said | {
            name: weights({"": tensor[:: max(1, len(tensor) // 1000)]}) for name, tensor in whole.items()
        }
    said |= {"data": type(source).__name__, "name": _name(source), "samples": _length(source)}
    if not isinstance(source, IterableDataset) and said["samples"]:
        said |= {"labels": _labels(source), "items": _items(loader, source, said["samples"], generators)}
    return said


def optimiser(optimizer: Optimizer) -> dict[str, object]:
    """Describe an optimizer: class, settings and size of each parameter group."""
    groups = []
    for group in optimizer.param_groups:
        own = {name: describe(value) for name, value in group.items() if name != "params"}
        own["lr"] = describe(own.pop("initial_lr", own["lr"]))  # a scheduler moves the other
        count = sum(p.numel() for p in group["params"] if not getattr(p, "late", False))
        groups.append(own | {"parameters": count})
    return {"class": type(optimizer).__name__, "groups": groups}


def schedule(scheduler: LRScheduler | None) -> dict[str, object] | None:
    """Describe a scheduler: class and settings without its current state."""
    if scheduler is None:
        return None
    own = {k: v for k, v in vars(scheduler).items() if k not in _MOVING and not k.startswith("_")}
    said = {"class": type(scheduler).__name__} | {name: describe(value) for name, value in own.items()}
    if hasattr(scheduler, "_schedulers"):  # SequentialLR, ChainedScheduler
        said["schedulers"] = [schedule(part) for part in scheduler._schedulers]
        said["milestones"] = getattr(scheduler, "_milestones", None)
    return said


def describe(value: object, depth: int = 0) -> object:
    """Convert a value to JSON without memory addresses: an object to its class and public fields."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if depth > DEEPEST:
        return type(value).__name__
    if isinstance(value, LateWeights):  # shapes follow from the networks, once they have been seen
        return _fields(value, depth)
    if isinstance(value, nn.Module):
        own = _fields(value, depth)
        return own | {k: v for k, v in network(value, layers=False, initial=False).items() if k not in own}
    if isinstance(value, (Tensor, np.ndarray)):
        tensor = torch.as_tensor(value)
        return tensor.tolist() if tensor.numel() <= 16 else weights({"": tensor})
    if isinstance(value, Mapping):
        return {str(key): describe(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(inner, depth + 1) for inner in value]
    if isinstance(value, torch.Generator):
        return {"class": "Generator", "seed": value.initial_seed()}
    if isinstance(value, (Path, torch.dtype, torch.device, np.generic)):
        return str(value)
    if isinstance(value, functools.partial):
        return describe({"partial": value.func, "args": value.args, "keywords": value.keywords}, depth + 1)
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)):
        return f"{value.__module__}.{value.__qualname__}"
    return _fields(value, depth)


def sentence(objective: object) -> str:
    """Describe an objective by a text that is the same in every process."""
    if isinstance(objective, Sum):
        return " + ".join(map(sentence, objective.objectives))
    if type(objective).__repr__ not in (object.__repr__, nn.Module.__repr__):
        return repr(objective)
    public = {k: v for k, v in vars(objective).items() if not k.startswith("_") and k != "training"}
    shown = ", ".join(f"{name}={public[name]!r}" for name in sorted(public))
    return f"{type(objective).__name__}({shown})"


def _fields(value: object, depth: int) -> dict[str, object]:
    if is_dataclass(value):
        own = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    else:
        own = dict(getattr(value, "__dict__", {}))
    public = {
        name: describe(inner, depth + 1)
        for name, inner in own.items()
        if not name.startswith("_") and name != "training"
    }
    return {"class": type(value).__name__} | public


def _layer(module: nn.Module) -> str | dict[str, object]:
    """Describe a layer: class and settings without those of its submodules."""
    kind = type(module)
    weights = {
        name: f"{str(p.dtype).removeprefix('torch.')} {list(p.shape)}"
        for name, p in module._parameters.items()
        if p is not None
    }
    if kind.__module__.startswith("torch.nn."):
        return f"{kind.__name__}({module.extra_repr()})" + "".join(f", {n} {w}" for n, w in weights.items())
    own = {
        name: describe(value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _STATE and isinstance(value, _SETTINGS)
    }
    return {"class": kind.__name__} | own | weights if own or weights else kind.__name__


def _name(source: object) -> str | None:
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else None


def _length(source: object) -> int | None:
    try:
        return len(source)
    except TypeError:
        return None


def _labels(source: object) -> str | None:
    """Compute a digest of all labels, if the data set keeps them as torchvision's and PyTorch's do."""
    if isinstance(source, Subset):
        return _digest(repr((_labels(source.dataset), list(source.indices))).encode())
    tensors = getattr(source, "tensors", None)
    for labels in (
        getattr(source, "targets", None),
        getattr(source, "labels", None),
        tensors and tensors[-1],
    ):
        if isinstance(labels, (Tensor, np.ndarray)):
            labels = labels.tolist()
        if isinstance(labels, (list, tuple)):
            return _digest(repr(list(labels)).encode())
    return None


def _items(
    loader: Iterable, source: Sequence, count: int, generators: Mapping[str, random_state.Generator]
) -> list[str] | None:
    """Compute digests of a few items; ``None`` if they cannot be read or differ each time."""
    chosen = sorted({count * number // SAMPLED for number in range(SAMPLED)})
    before = random_state.random_state(generators)
    found = []
    try:
        for _ in range(2):
            random_state.set_random_state(before, generators)
            random_state.seed_everything(0)
            if getattr(loader, "num_workers", 0):  # a file that it opens must not be shared with workers
                items = _from_worker(loader, source, chosen)
            else:
                items = (source[index] for index in chosen)
            found.append([_digest(_bytes(item)) for item in items])
    except Exception:  # training will say what is wrong with it
        return None
    finally:
        random_state.set_random_state(before, generators)
    return found[0] if found[0] == found[1] else None


def _from_worker(loader: DataLoader, source: Sequence, chosen: list[int]) -> Iterable[object]:
    return DataLoader(
        source,
        batch_size=None,
        sampler=chosen,
        collate_fn=_as_it_is,
        num_workers=1,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator().manual_seed(0),
    )


def _as_it_is(item: object) -> object:
    return item


def _bytes(item: object) -> bytes:
    if isinstance(item, (list, tuple)):
        return b"(" + b",".join(_bytes(part) for part in item) + b")"
    if isinstance(item, (Tensor, np.ndarray, np.generic)):
        return weights({"": torch.as_tensor(item)}).encode()
    plain = isinstance(item, (str, bytes, int, float, type(None)))
    return (repr(item) if plain else type(item).__name__).encode()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
