"""Training state: epoch, step, history and random-number generators, as a checkpoint holds them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..runtime import distributed, random_state
from .checkpoint import CheckpointError
from .metrics import EpochMetrics
from .run_folder import RunFolder

log = logging.getLogger(__name__)


@dataclass
class Epoch:
    """State of an unfinished epoch.

    Attributes:
        number: number of the epoch, starting at 1.
        start: random state before the first batch, which reproduces the loader's order.
        random: random state at ``position``, to continue with after a restart.
        position: number of batches processed.
        skipped: number of these batches that were left out.
        seconds: training time so far.
        metrics: means so far, ``None`` before the first step.
    """

    number: int
    start: dict[str, object]
    random: dict[str, object] | None = None
    position: int = 0
    skipped: int = 0
    seconds: float = 0.0
    metrics: EpochMetrics | None = None


class Progress:
    """Steps, epochs and random states of a run, which checkpoints save and restore.

    Args:
        student, optimizer, scheduler, scaler: objects whose states are saved too.
        device: device to train on.
        others: further trained modules, by name.

    Attributes:
        step: number of optimizer steps so far.
        history: one row per finished epoch.
        epoch: the unfinished epoch, if any.
        generators: random-number generators beside the global ones, by their place in the objects.
    """

    def __init__(
        self,
        student: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        scaler: torch.amp.GradScaler,
        device: torch.device,
        others: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.student, self.optimizer, self.scheduler = student, optimizer, scheduler
        self.others = dict(others or {})
        self.scaler, self.device = scaler, device
        self.step, self.epoch = 0, None
        self.history: list[dict[str, float]] = []
        self.generators: dict[str, random_state.Generator] = {}

    def use_generators(self, owners: Mapping[str, object]) -> None:
        """Add the random-number generators that these objects hold to the random state."""
        self.generators = random_state.generators_of(owners)

    def random_state(self) -> dict[str, object]:
        """Return the state of all random-number generators of this process."""
        return random_state.random_state(self.generators)

    def set_random_state(self, state: dict[str, object]) -> None:
        """Restore a state of :meth:`random_state`."""
        random_state.set_random_state(state, self.generators)

    def seed(self, seed: int | None) -> None:
        """Seed a new run; each process draws its own random numbers."""
        if self.step or self.history or self.epoch:
            return
        rank = distributed.rank()
        if seed is not None or rank:
            random_state.seed_everything(((torch.initial_seed() if seed is None else seed) + rank) % 2**63)
        for generator in self.generators.values() if rank else ():
            if isinstance(generator, torch.Generator):
                generator.manual_seed((generator.initial_seed() + rank) % 2**63)

    def begin(self, number: int) -> Epoch:
        """Begin an epoch, or resume the unfinished epoch of a checkpoint."""
        if self.epoch is None:
            self.epoch = Epoch(number, self.random_state())
        else:
            self.set_random_state(self.epoch.start)
        return self.epoch

    def finish(self, row: dict[str, float]) -> None:
        """Finish the epoch and add its row to the history."""
        self.history.append(row)
        self.epoch = None

    def save(self, folder: RunFolder) -> None:
        """Write a checkpoint with the state of every process.

        Raises:
            CheckpointError: the checkpoint cannot be written.
        """
        epoch, own = self.epoch, {"random": self.random_state()}
        state = {
            "step": self.step,
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": None,
        }
        if self.others:
            state["others"] = {name: module.state_dict() for name, module in self.others.items()}
        if epoch is not None:
            state["epoch"] = {
                name: getattr(epoch, name) for name in ("number", "position", "skipped", "seconds")
            }
            own |= {"start": epoch.start, "metrics": epoch.metrics and epoch.metrics.state_dict()}
        folder.save(self.step, self.student.state_dict(), state | {"processes": distributed.of_all(own)})

    def resume(self, folder: RunFolder | None) -> None:
        """Restore the folder's last checkpoint, unless this object holds later state already.

        Raises:
            CheckpointError: no checkpoint is intact, or it belongs to another run.
        """
        begun = self.epoch is not None
        if folder is None or (self.history and not begun):
            self.epoch = None
            return
        found = folder.load()
        if found is None:
            if begun:
                log.warning(
                    "no checkpoint of the interrupted epoch: it starts again with the current weights"
                )
            self.epoch = None
            folder.go_back(self.step, self.history)
            return
        path, weights, state = found
        try:
            self._restore(weights, state)
        except Exception as error:  # a state of other keys, types or shapes raises every kind
            raise CheckpointError(
                f"checkpoint {path} does not fit this run ({type(error).__name__}: {error}); use another run "
                f"folder, or the networks and optimiser that it was made with"
            ) from error
        folder.go_back(self.step, self.history)
        within = "" if self.epoch is None else f" and {self.epoch.position} batches"
        log.info("continuing after epoch %d%s, step %d, from %s", len(self.history), within, self.step, path)

    def _restore(self, weights: dict[str, torch.Tensor], state: dict[str, object]) -> None:
        own = state["processes"][distributed.rank()]
        if (self.scheduler is None) != (state["scheduler"] is None):
            raise ValueError(
                f"its run had {'a' if self.scheduler is None else 'no'} scheduler, unlike this one"
            )
        saved = state.get("others", {})
        if saved.keys() != self.others.keys():
            raise ValueError(f"its objective has weights {sorted(saved)}, this one {sorted(self.others)}")
        for name, module in self.others.items():
            module.load_state_dict(saved[name])
        self.student.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if not isinstance(state["step"], int) or not isinstance(state["history"], list):
            raise ValueError(f"step is {state['step']!r}, history a {type(state['history']).__name__}")
        self.step, self.history, self.epoch = state["step"], [dict(row) for row in state["history"]], None
        there, here = own["random"]["generators"].keys(), self.generators.keys()
        if there != here:
            log.warning(
                "random generators are not where they were (then %s, now %s): what they draw may be others",
                ", ".join(there - here) or "none besides", ", ".join(here - there) or "none besides",
            )  # fmt: skip
        self.set_random_state(own["random"])
        if state["epoch"] is not None:
            saved = own["metrics"]
            metrics = None if saved is None else EpochMetrics.restored(saved, self.device)
            self.epoch = Epoch(start=own["start"], random=own["random"], metrics=metrics, **state["epoch"])
