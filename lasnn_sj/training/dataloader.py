"""Batches of a training loader: resumable order, and shares for several processes."""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from ..runtime import distributed, random_state

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A batch and its position in the epoch.

    Attributes:
        content: the batch, as the loader gave it.
        position: number within the epoch, from 0 on.
        indices: of its samples in the data set, where they are known.
        weight: of its mean loss in the mean over the processes; 0 of a process that has no sample left for
            the epoch's last step, and computes one of another's only to take part.
    """

    content: object
    position: int
    indices: list[int] | None
    weight: float = 1.0


class TrainingBatches:
    """This process' batches of a training loader, each epoch from any position on.

    A plain :class:`~torch.utils.data.DataLoader` of a map-style data set keeps its order. Several
    processes share it: they take turns with its samples, so that two of them with batches of ``B`` see
    together what one would see in a batch of ``2 B``. The samples of the last step are shared as evenly as
    they go, and weighted so that each counts the same. A :class:`~torch.utils.data.DistributedSampler` is
    left as it is and told the epoch. Any other loader must give each process its own batches.

    Positions are skipped for nothing where the loader has no workers; else what lies before is loaded again
    and dropped, because a worker's random numbers depend on what it has loaded.

    Args:
        loader: gives ``(images, labels)``.

    Attributes:
        even: whether every process is sure to have as many batches.
    """

    def __init__(self, loader: Iterable) -> None:
        self.loader, self._order, self._source = loader, None, loader
        self.even = _can_be_rebuilt(loader) or distributed.world_size() == 1
        if _can_be_rebuilt(loader):
            self._order = ResumableBatchSampler(loader)
            self._source = _rebuilt(loader, self._order)
        elif distributed.world_size() > 1:
            log.warning(
                "%s cannot be shared out: each process trains on what its own loader gives",
                type(loader).__name__,
            )
        if getattr(loader, "num_workers", 0) and getattr(loader, "persistent_workers", False):
            log.warning(
                "persistent workers carry their random numbers from epoch to epoch, which no checkpoint "
                "holds; a resumed run will augment differently (persistent_workers=False does not)"
            )

    def __len__(self) -> int:
        """Return the number of batches of an epoch, 0 if it is unknown."""
        try:
            return len(self._source)
        except TypeError:  # a loader of a stream has a __len__ that raises
            return 0

    def epoch(self, number: int, start: int, arrive: Callable[[], None]) -> Iterator[Batch]:
        """Iterate over the batches of an epoch from position ``start`` on.

        Args:
            number: number of the epoch, starting at 1.
            start: number of batches to skip.
            arrive: called after the skipped batches, before the next batch is loaded.
        """
        for part in parts_of(self.loader):
            if hasattr(part, "set_epoch"):
                part.set_epoch(number - 1)
        first = 0
        if self._order is not None:
            self._order.given.clear()
            if self._source.num_workers == 0:
                self._order.skip(start, arrive)
                first = start
        source = iter(self._source)
        for position in itertools.count(first):
            if position == start and start > first:
                arrive()
            try:
                content = next(source)
            except StopIteration:
                return
            indices = self._order.given.popleft() if self._order is not None else None
            if position >= start:
                weight = 1.0 if self._order is None else self._order.weight(position)
                yield Batch(content, position, indices, weight)


class ResumableBatchSampler:
    """Batch sampler that yields a loader's batches of indices, or this process' share, from any position."""

    def __init__(self, loader: DataLoader) -> None:
        self._loader, self._skip = loader, 0
        self._arrive: Callable[[], None] | None = None
        self.given: deque[list[int]] = deque()

    def skip(self, count: int, arrive: Callable[[], None]) -> None:
        """Skip the first ``count`` batches of the next epoch."""
        self._skip, self._arrive = count, arrive if count else None

    def __len__(self) -> int:
        loader, processes = self._loader, distributed.world_size()
        if not self._shares:
            return len(loader.batch_sampler)
        if loader.batch_size is None:
            return len(loader.batch_sampler) // processes
        steps = len(loader.sampler) / (loader.batch_size * processes)
        return math.floor(steps) if loader.drop_last else math.ceil(steps)

    def weight(self, position: int) -> float:
        """This process' part of a step's samples, in units of an equal part."""
        if not self._shares or self._loader.batch_size is None:
            return 1.0
        rank, processes = distributed.rank(), distributed.world_size()
        whole = self._loader.batch_size * processes
        count = min(whole, len(self._loader.sampler) - position * whole)
        return len(range(rank, count, processes)) * processes / count

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self._share() if self._shares else self._loader.batch_sampler)
        for _ in itertools.islice(batches, self._skip):
            pass
        if self._arrive is not None:
            self._arrive()
        for indices in batches:
            self.given.append(list(indices))
            yield indices

    @property
    def _shares(self) -> bool:
        return distributed.world_size() > 1 and not _is_shared(self._loader)

    def _share(self) -> Iterator[list[int]]:
        loader, rank, processes = self._loader, distributed.rank(), distributed.world_size()
        if loader.batch_size is None:  # a batch sampler of the user's: whole batches in turn
            batches = distributed.from_main([list(b) for b in loader.batch_sampler] if rank == 0 else None)
            yield from batches[rank : len(batches) // processes * processes : processes]
            return
        order = distributed.from_main(list(loader.sampler) if rank == 0 else None)
        whole = loader.batch_size * processes
        for start in range(0, len(self) * whole, whole):
            step = order[start : start + whole]
            yield step[rank::processes] or step[:1]


def parts_of(*loaders: Iterable | None) -> list[object]:
    """Return the loaders, their samplers, batch samplers, the samplers of these, and the data sets."""
    parts: list[object] = list(loaders)
    for name in ("sampler", "batch_sampler", "dataset"):
        parts += [getattr(loader, name, None) for loader in loaders]
    return parts + [getattr(part, "sampler", None) for part in parts]


def _is_shared(loader: DataLoader) -> bool:
    """Return whether the loader's own sampler gives each process a share."""
    return any(isinstance(part, DistributedSampler) for part in parts_of(loader))


def evaluation_share(loader: Iterable) -> Iterable:
    """Return this process' share of an evaluation loader; each sample is evaluated by one process.

    Processes take the samples of a plain :class:`~torch.utils.data.DataLoader` in turn (without the padding
    of a ``DistributedSampler``), and the batches of any other loader. Every process draws the order of
    another ``DataLoader`` from the random state of process 0; other loaders must give all processes the
    same batches.
    """
    rank, processes = distributed.rank(), distributed.world_size()
    if processes == 1:
        return loader
    shared = _can_be_rebuilt(loader) and _is_shared(loader)
    if not shared and (not _can_be_rebuilt(loader) or loader.batch_size is None):
        return (
            _in_turn(loader)
            if isinstance(loader, DataLoader)
            else itertools.islice(loader, rank, None, processes)
        )
    if shared:
        order = range(len(loader.dataset))
    else:
        order = distributed.from_main(list(loader.sampler) if rank == 0 else None)
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", 1)
    return _rebuilt(loader, BatchSampler(order[rank::processes], batch_size, drop_last=False))


def _in_turn(loader: DataLoader) -> Iterator[object]:
    generators = random_state.generators_of({"loader": loader})
    own = random_state.random_state(generators)
    random_state.set_random_state(distributed.from_main(own), generators)
    try:
        yield from itertools.islice(loader, distributed.rank(), None, distributed.world_size())
    finally:
        random_state.set_random_state(own, generators)


def _can_be_rebuilt(loader: Iterable) -> bool:
    return (
        type(loader) is DataLoader
        and loader.batch_sampler is not None
        and not isinstance(loader.dataset, IterableDataset)
    )


def _rebuilt(loader: DataLoader, batch_sampler: object) -> DataLoader:
    """Return the same loader with another batch sampler."""
    return DataLoader(
        loader.dataset,
        batch_sampler=batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )
