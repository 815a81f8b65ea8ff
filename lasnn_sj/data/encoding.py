"""Input encodings: add the time axis to a batch of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .late_checks import require

PIECE = 1 << 18  # random numbers drawn at a time on the CPU: 1 MiB, which stays in the cache


class _Encoder(nn.Module):
    def __init__(self, T: int) -> None:
        super().__init__()
        if isinstance(T, bool) or not isinstance(T, int) or T < 1:
            raise ValueError(f"T must be a whole number of time steps, at least 1, got {T!r}")
        self.T = T

    def extra_repr(self) -> str:
        return f"T={self.T}"

    def forward(self, images: Tensor) -> Tensor:
        """Encode a batch: ``[N, ...]`` to ``[T, N, ...]``."""
        return self.steps(images, self.T)

    def steps(self, images: Tensor, steps: int) -> Tensor:
        """Encode the next ``steps`` time steps of a batch: ``[N, ...]`` to ``[steps, N, ...]``.

        On the CPU the results of several calls, concatenated, equal that of one call for all steps. A random
        code on CUDA is then another sample of the same distribution, because its random numbers depend on
        the size of each call.
        """
        raise NotImplementedError


class PoissonEncoder(_Encoder):
    """Signed Poisson code: ``sign(x) * (u <= |x|)`` with ``u`` uniform in [0, 1), drawn per step and pixel.

    A pixel of value ``x`` in [-1, 1] fires spikes of its sign with probability ``|x|``, so the expected mean
    over time is ``x``. (SpikingJelly's encoder never fires for ``x < 0``.) ``u`` is a float32 whatever the
    dtype of the images: a coarser one would distort small rates.

    Args:
        T: number of time steps.
        generator: random-number generator on the images' device; the default one if ``None``.

    Shape:
        - input ``[N, ...]``, values in [-1, 1]
        - output ``[T, N, ...]`` of -1, 0 and 1, in the input's dtype

    Raises:
        ValueError: a pixel is NaN or outside [-1, 1].
    """

    def __init__(self, T: int, generator: torch.Generator | None = None) -> None:
        super().__init__(T)
        self.generator = generator

    def steps(self, images: Tensor, steps: int) -> Tensor:
        magnitude = images.abs()
        if images.numel():  # a NaN fails the comparison too
            require(magnitude.amax() <= 1, _out_of_range, images)
        draw = _draw_at_once if images.is_cuda else _draw_in_pieces
        return draw(magnitude, images.sign(), steps, self.generator)


def _out_of_range(images: Tensor) -> ValueError:
    return ValueError(
        f"PoissonEncoder needs pixels in [-1, 1], got values from {images.amin().item():.4g} to "
        f"{images.amax().item():.4g}; normalise with mean 0.5 and std 0.5 per channel"
    )


def _draw_in_pieces(magnitude: Tensor, sign: Tensor, steps: int, generator: torch.Generator | None) -> Tensor:
    """Draw the Poisson code of ``steps`` steps, without a float32 tensor of all random numbers."""
    code = sign.new_empty((steps, *sign.shape))
    for part in code.split(max(1, PIECE // max(1, sign.numel()))):
        u = torch.rand(part.shape, generator=generator, device=sign.device, dtype=torch.float32)
        torch.mul(u.le_(magnitude), sign, out=part)
    return code


def _draw_at_once(magnitude: Tensor, sign: Tensor, steps: int, generator: torch.Generator | None) -> Tensor:
    """Draw the Poisson code of ``steps`` steps in one CUDA kernel; random numbers stay in registers."""
    # float32 for coarser images too, as the kernel compares in this dtype; a rate out of range, which may not
    # have been read yet, would stop the device
    rate = magnitude.to(torch.promote_types(magnitude.dtype, torch.float32)).nan_to_num(0.0).clamp(max=1)
    code = sign.new_empty((steps, *sign.shape)).bernoulli_(rate, generator=generator)
    return code.mul_(sign)


class DirectEncoder(_Encoder):
    """Direct code: the real-valued image repeated at every step; the first convolution and neuron encode it.

    The output is a view with time stride 0: nothing is copied, and the networks of :mod:`lasnn_sj.models`
    compute their first convolution once instead of ``T`` times.

    Args:
        T: number of time steps.

    Shape:
        - input ``[N, ...]``
        - output ``[T, N, ...]``, in the input's dtype
    """

    def steps(self, images: Tensor, steps: int) -> Tensor:
        return images.unsqueeze(0).expand(steps, *images.shape)
