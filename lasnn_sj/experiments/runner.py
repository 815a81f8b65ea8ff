"""Stages in a run folder, each run once."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..analysis.stages import folder_name
from ..data import DeviceLoader
from ..runtime import distributed, files, random_state
from ..runtime.cost import Cost
from ..runtime.files import check_settings
from ..runtime.locks import FolderLock
from ..training import fingerprint
from ..training.checkpoint import CheckpointError, load_weights, save_weights
from ..training.trainer import Trainer
from .recipes import Recipe, ReverseRecipe

log = logging.getLogger(__name__)

ABOUT = "about.json"  # class and data set of the run in a folder
KEEPING = ("cuda",)  # types of devices on which the images of a data set are kept


class Data(Protocol):
    """Interface of :class:`~lasnn_sj.data.ImageData` and :class:`~lasnn_sj.data.EventData`."""

    name: str
    num_classes: int
    in_channels: int
    image_size: int
    train: Sequence
    test: Sequence
    validation: Sequence | None

    def loaders(self, batch_size: int, workers: int = 0, seed: int = 0) -> tuple[DataLoader, DataLoader]: ...

    def test_loader(self, batch_size: int, workers: int = 0) -> DataLoader: ...


class Runner:
    """Base class of runners of stages in a folder; finished stages are not run again.

    Under torchrun the processes share the batches of every training; only rank 0 writes files.

    Args:
        recipe: description of the run.
        data: images or event frames.
        run_dir: folder of the run, created if missing; each stage has a folder in it.
        device: device to run on.
        settings: settings written to ``recipe.json``; a later run in this folder must have the same.
        frames: settings of event frames, written to ``frames.json``; likewise.

    Raises:
        ValueError: the folder holds a run with other settings or data; the message lists what differs. Or
            the processes cannot share a batch equally.
    """

    def __init__(
        self,
        recipe: Recipe | ReverseRecipe,
        data: Data,
        run_dir: str | Path,
        device: torch.device | str,
        settings: Mapping[str, object],
        frames: Mapping[str, object] | None = None,
    ) -> None:
        self.recipe, self.data = recipe, data
        self.device, self.run_dir = distributed.initialise(torch.device(device)), Path(run_dir)
        for name in ("teacher_batch", "ann_batch", "batch"):
            distributed.share_batch(f"recipe.{name}", getattr(recipe, name, 0))
        distributed.by_main(self._begin)
        self._lock = FolderLock(self.run_dir)
        self._check("recipe.json", settings)
        if frames is not None:  # before the data, whose digests would hide the settings that differ
            self._check("frames.json", frames)
        parts = {"train": data.loaders(1)[0], "test": data.test_loader(1)}
        self._check("data.json", {name: fingerprint.data(loader, {}) for name, loader in parts.items()})

    def _begin(self) -> None:
        files.make_folder(self.run_dir)
        files.remove_parts(self.run_dir, files.ABANDONED)

    def _check(self, name: str, settings: Mapping[str, object]) -> None:
        """Compare settings with those in a file of the folder; write the file if it is missing."""
        distributed.by_main(lambda: check_settings(self.run_dir / name, settings))

    def _hold_to(self, name: str, net: nn.Module) -> None:
        """Refuse a given network that differs from the one given before."""
        said = {"class": type(net).__name__, "weights": fingerprint.weights(net.state_dict())}
        self._check(f"given_{name}.json", said)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Context that holds the lock of the whole folder."""
        distributed.by_main(self._lock.__enter__)
        try:
            yield
        finally:
            if distributed.is_main():
                self._lock.__exit__()

    def _fill(self, net: nn.Module, path: Path) -> CheckpointError | None:
        """Load the weights in a file into a network; return the error if they cannot be used."""
        error = None
        if distributed.is_main():
            try:
                load_weights(path, net)
            except CheckpointError as own:
                error = own
        error = distributed.from_main(error)
        if error is None:
            distributed.take_network_from_main(net)
        return error

    def _finished(self, name: str) -> dict | None:
        """Read the result of a stage; ``None`` if it is not finished."""
        path = f"{folder_name(name)}/result.json"
        return distributed.of_main(lambda: files.read_json(files.inside(self.run_dir, path)))

    def _result(
        self,
        name: str,
        run: Callable[[Path], dict],
        prepare: Callable[[], object] = lambda: None,
        whole_folder: bool = True,
    ) -> dict:
        """Return the result of a stage, and run the stage first if it is not finished.

        Args:
            name: name of the stage.
            run: runs the stage; time and memory are added to its result.
            prepare: called before, not measured.
            whole_folder: lock the whole run folder meanwhile, so that no other stage runs in it.
        """
        result = self._finished(name)
        if result is not None:
            return result
        with self._held() if whole_folder else nullcontext():
            prepare()
            folder = self.run_dir / folder_name(name)
            distributed.by_main(lambda: self._describe(folder))
            log.info("%s of %s", name, self.run_dir)
            # The result must not depend on the stages that this process has run before.
            random_state.seed_everything(self.recipe.seed)
            with Cost(self.device) as cost:
                result = run(folder)
            result |= {"seconds": cost.seconds, "peak_memory_mib": cost.peak_memory_mib}
            result = distributed.from_main(result)
            distributed.by_main(lambda: files.write_json(folder / "result.json", result))
        return result

    def _describe(self, folder: Path) -> None:
        d = self.data
        folder.mkdir(exist_ok=True)
        files.remove_parts(folder, files.ABANDONED)
        about = {
            "kind": type(self).__name__, "data": d.name, "num_classes": d.num_classes,
            "in_channels": d.in_channels, "image_size": d.image_size, "test": len(d.test),
        }  # fmt: skip
        if files.read_json(self.run_dir / ABOUT) != about:
            files.write_json(self.run_dir / ABOUT, about)

    def _fit(self, trainer: Trainer, epochs: int, batch: int) -> dict[str, float]:
        """Train to the end and save the weights; return the median seconds of an epoch."""
        r = self.recipe
        own = distributed.share_batch("batch", batch)
        train, held = self.data.loaders(own, r.workers, seed=r.seed)
        train = self._on_device(train, shuffle=True, seed=r.seed)
        validation = None if self.data.validation is None else self._on_device(held)
        history = trainer.fit(train, validation, epochs, r.validate_every)
        path = trainer.run_dir / "weights.safetensors"
        distributed.by_main(lambda: save_weights(path, trainer.student))
        return {"seconds_per_epoch": statistics.median(row["seconds"] for row in history)}

    def _test(self, batch: int) -> DataLoader | DeviceLoader:
        return self._on_device(self.data.test_loader(batch, self.recipe.workers))

    def _on_device(self, loader: DataLoader, **order: object) -> DataLoader | DeviceLoader:
        """Return a loader of the same images that keeps them on the device; the same one on a CPU."""
        if self.device.type not in KEEPING or distributed.world_size() > 1:
            return loader
        return DeviceLoader.of(loader.dataset, loader.batch_size, self.device, **order) or loader
