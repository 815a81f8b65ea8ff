"""Several processes that train one network: ranks and collective operations.

``torchrun`` starts the processes; everything here also works alone, where it does nothing.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(hours=6)  # the others wait while process 0 converts, balances or calibrates alone
Result = TypeVar("Result")


def initialise(device: torch.device) -> torch.device:
    """Join the process group if ``torchrun`` started this process; NCCL on CUDA, gloo elsewhere.

    Args:
        device: where this process is to train.

    Returns:
        The device, on CUDA the one of this process' ``LOCAL_RANK``.

    Raises:
        ValueError: a CUDA device by number that is not this process' own.
    """
    if device.type == "cuda" and device.index is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        if device.index != int(os.environ["LOCAL_RANK"]):
            raise ValueError(
                f"device is {device}, but torchrun gives this process cuda:{os.environ['LOCAL_RANK']}; give "
                f"device cuda"
            )
    if not dist.is_initialized():
        if not dist.is_available() or "TORCHELASTIC_RUN_ID" not in os.environ:
            return device
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

        store, number, count = next(rendezvous("env://"))
        # torchrun's store outlives a restart, with the addresses of the processes that died
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
        atexit.register(_leave)
        if dist.get_rank() > 0:  # each message once
            logging.getLogger(__package__.partition(".")[0]).setLevel(logging.WARNING)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process, 0 if it is the only one."""
    return dist.get_rank() if _together() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if _together() else 1


def is_main() -> bool:
    """Return whether this process has rank 0, which writes files."""
    return rank() == 0


def total(values: Tensor) -> Tensor:
    """Sum ``values`` over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def any_of(flags: list[bool], device: torch.device) -> list[bool]:
    """Return for each flag whether any process set it."""
    if world_size() == 1:
        return flags
    raised = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return [bool(flag) for flag in raised.tolist()]


def least(value: int, device: torch.device) -> int:
    """Return the smallest ``value`` of all processes."""
    if world_size() == 1:
        return value
    smallest = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    return int(smallest)


def all_of(flag: bool, device: torch.device) -> bool:
    """Return whether every process set the flag."""
    return not any_of([not flag], device)[0]


def from_main(value: object) -> object:
    """Return the object of rank 0."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def by_main(call: Callable[[], None]) -> None:
    """Call a function on rank 0; if it fails, all processes raise.

    Raises:
        Exception: what ``call`` raised, in process 0.
        RuntimeError: in the others, with the same message.
    """
    error = None
    if is_main():
        try:
            call()
        except Exception as own:
            error = own
    message = from_main(error and f"{type(error).__name__} in process 0: {error}")
    if message is not None:
        raise error or RuntimeError(message)


def of_main(call: Callable[[], Result]) -> Result:
    """Return what process 0 computes; where it fails, all do, as in :func:`by_main`."""
    results = []
    by_main(lambda: results.append(call()))
    return from_main(results[0] if results else None)


def main_first(call: Callable[[], Result]) -> Result:
    """Let process 0 do something before the others, which find what it has downloaded."""
    results = []
    by_main(lambda: results.append(call()))
    return results[0] if results else call()


def share_batch(name: str, batch: int) -> int:
    """Return each process' part of a batch.

    Raises:
        ValueError: the batch cannot be divided.
    """
    count = world_size()
    if batch % count:
        near = [n for n in (batch // count * count, -(-batch // count) * count) if n]
        raise ValueError(
            f"{name} is {batch}, which {count} processes cannot share equally; give "
            f"{' or '.join(map(str, near))}, or start another number of processes"
        )
    return batch // count


def take_network_from_main(net: nn.Module) -> None:
    """Fill a network with the weights and buffers of process 0's."""
    if world_size() > 1:
        own = {name: tensor.cpu() for name, tensor in net.state_dict().items()} if is_main() else None
        net.load_state_dict(from_main(own))


def take_from_main(tensor: Tensor) -> None:
    """Copy a tensor from rank 0, in place."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def of_all(value: object) -> list:
    """Return the values of all processes in order of rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()
