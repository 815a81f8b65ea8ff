"""Forward pass of the student with its taps, over all time steps at once or in chunks."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from spikingjelly.activation_based import base
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..distillation.taps import ChunkTaps, StudentTaps
from ..neurons.layout import use_channels_last


class StudentForward(nn.Module):
    """Run a student; DistributedDataParallel wraps this module.

    With ``time_chunks`` above 1 the time steps are run in this many chunks, which pass on the neurons' state.
    Only that state is kept for the backward pass, which runs each chunk a second time. The gradients are
    those of a single chunk.

    Args:
        student: network ``[T, N, ...]`` to ``[T, N, K]``; any output with a single chunk.
        taps: taps to read, or ``None``.
        time_chunks: number of chunks.

    Raises:
        ValueError: several chunks for a student with batch norm, whose statistics span all time steps.
    """

    def __init__(self, student: nn.Module, taps: StudentTaps | None, time_chunks: int) -> None:
        super().__init__()
        self.student, self.time_chunks = student, time_chunks
        self.taps = taps
        if time_chunks > 1:
            refuse_batch_norm(student)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the student's output for ``x`` and the values of the taps, ``[N, C, H, W]`` each."""
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
        with self.taps or nullcontext():
            return self._pass(x)

    def _pass(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Run the part that is compiled, as one graph without breaks."""
        return self.student(x), [] if self.taps is None else self.taps.collect()

    def compile(self, **options: object) -> None:
        """Compile the student's pass in place; for the options see ``torch.compile``."""
        self._pass = torch.compile(self._pass, **options)

    def _piece(self, x: Tensor, traces: list, state: list) -> tuple[Tensor, list[Tensor], list, list]:
        """Run one chunk without side effects; ``checkpoint`` repeats its random numbers."""
        base.load_memories(self.student, state)
        if isinstance(self.taps, ChunkTaps):
            self.taps.traces = traces
        output, seen = self._tapped(x)
        if isinstance(self.taps, ChunkTaps):
            traces = self.taps.traces
        return output, seen, traces, base.extract_memories(self.student)


def refuse_batch_norm(student: nn.Module) -> None:
    """Raise :class:`ValueError` if a layer's output depends on how time is split."""
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"time_chunks cannot be used with batch norm ({name}), whose statistics are of all time "
                f"steps together; use time_chunks=1, or accumulate to save memory"
            )


def place(module: nn.Module, device: torch.device) -> None:
    """Bring a network to a device; its convolutions' weights in the order in which they are faster."""
    module.to(device)
    use_channels_last(module)
