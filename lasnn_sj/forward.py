"""The student's pass through a batch, with what the attention wants to see, whole or in pieces of time."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .neurons import TimeLoopNode
from .neurons.dynamics import TRACE_DECAY
from .taps import StudentTaps


class StudentForward(nn.Module):
    """Runs a student; what several processes wrap instead of the student itself.

    With ``time_chunks`` above 1 the time steps are run in so many pieces, which hand on the neurons' state;
    only that state is kept for the backward pass, and each piece is run a second time then. The gradients
    are those of one piece.

    Args:
        student: network ``[T, N, ...]`` to ``[T, N, K]``, or for one piece any other.
        taps: what to read of it, or ``None``.
        time_chunks: how many pieces.

    Raises:
        ValueError: pieces for a student with batch norm, which would see each by itself.
    """

    def __init__(self, student: nn.Module, taps: StudentTaps | None, time_chunks: int) -> None:
        super().__init__()
        self.student, self.time_chunks = student, time_chunks
        self.taps = taps
        if time_chunks > 1:
            refuse_batch_norm(student)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``x`` as the student takes it; its output, and what the taps read, ``[N, C, H, W]`` each."""
        if self.time_chunks == 1:
            return self._tapped(x)
        T = x.shape[0]
        if self.time_chunks > T:
            raise ValueError(f"time_chunks must be at most the T = {T} time steps, got {self.time_chunks}")
        outputs, maps, state = [], [], base.extract_memories(self.student)
        traces = self.taps.no_traces() if isinstance(self.taps, ChunkTaps) else []
        for piece in x.tensor_split(self.time_chunks):
            output, seen, traces, state = checkpoint(self._piece, piece, traces, state, use_reentrant=False)
            if output.dim() != 3 or len(output) != len(piece):
                raise ValueError(
                    f"time_chunks needs a student that gives [T, N, K], {type(self.student).__name__} gives "
                    f"{tuple(output.shape)} for T = {len(piece)}"
                )
            outputs.append(output)
            maps.append([value * (len(piece) / T) for value in seen])
        base.load_memories(self.student, state)
        return torch.cat(outputs), [sum(level) for level in zip(*maps)]

    def _tapped(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if self.taps is None:
            return self.student(x), []
        with self.taps:
            return self.student(x), self.taps.collect()

    def _piece(self, x: Tensor, traces: list, state: list) -> tuple[Tensor, list[Tensor], list, list]:
        """Pure but for random numbers, which ``checkpoint`` draws again alike."""
        base.load_memories(self.student, state)
        if isinstance(self.taps, ChunkTaps):
            self.taps.traces = traces
        output, seen = self._tapped(x)
        if isinstance(self.taps, ChunkTaps):
            traces = self.taps.traces
        return output, seen, traces, base.extract_memories(self.student)


def refuse_batch_norm(student: nn.Module) -> None:
    """Raise :class:`ValueError` where a layer's result would depend on how the time is cut."""
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"time_chunks cannot be used with batch norm ({name}), whose statistics are of all time "
                f"steps together; use time_chunks=1, or accumulate to save memory"
            )


class ChunkTaps(StudentTaps):
    """Spike activation maps (Eq. 11) of a piece of time, going on from the spike trace of the one before.

    With the trace ``n`` at the piece's start, the map of its ``S`` steps grows by ``n * sum over t of
    exp(-t) * o[t]``, and the trace at its end is ``exp(-S) * n + sum over t of exp(-(S - t)) * o[t]``.
    """

    def __init__(self, student: nn.Module, names: list[str], through_trace: bool) -> None:
        super().__init__(student, names, "activation_map", through_trace)
        self.traces: list[Tensor | None] = []
        self._places = {student.get_submodule(name): place for place, name in enumerate(names)}
        self._masks: dict[nn.Module, Tensor | None] = {}
        self._hooks += [
            node.register_forward_pre_hook(self._take_mask, with_kwargs=True) for node in self._places
        ]

    def no_traces(self) -> list[None]:
        """The traces before the first piece."""
        return [None] * len(self._names)

    def _take_mask(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The trace wants spikes as they were before dropout."""
        if not self._active:
            return None
        self._masks[module] = kwargs.pop("mask", None)
        return args, kwargs

    def read(self, module: TimeLoopNode, output: Tensor) -> tuple[Tensor, Tensor]:
        """The piece's mean map, and the output times its dropout mask."""
        value, _ = super().read(module, output)
        place, mask = self._places[module], self._masks.pop(module, None)
        with torch.autocast(output.device.type, enabled=False):  # einsum would be cast to half precision
            spikes = output.to(value.dtype)
            steps = torch.arange(len(output), device=output.device, dtype=value.dtype)
            trace = self.traces[place]
            if trace is not None:
                decayed = torch.einsum("t,t...->...", TRACE_DECAY**steps, spikes)
                value = value + trace * decayed / len(output)
            kept = spikes if self.through_trace else spikes.detach()
            late = torch.einsum("t,t...->...", TRACE_DECAY ** (len(output) - steps), kept)
        self.traces = [*self.traces]
        self.traces[place] = late if trace is None else late + TRACE_DECAY ** len(output) * trace
        return value, output if mask is None else output * mask
