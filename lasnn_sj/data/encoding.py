"""Input encodings: the only place where a time axis is born."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
        """The next ``steps`` steps of the code, ``[steps, N, ...]``.

        Called piece by piece it gives what one call over all steps would, without holding them all (of a
        random code on CUDA another draw of the same distribution, as draws depend on the call's size).
        """
        raise NotImplementedError


class PoissonEncoder(_Encoder):
    """Signed Poisson code: ``sign(x) * (u <= |x|)`` with ``u`` uniform in [0, 1), drawn per step and pixel.

    A pixel of value ``x`` in [-1, 1] gives spikes of its own sign with probability ``|x|``, so that the
    mean over time tends to ``x``. (SpikingJelly's encoder never fires where ``x < 0``.)

    Args:
        T: number of time steps.
        generator: source of the random numbers, on the images' device; the default one if ``None``.

    Shape:
        - input ``[N, ...]``, values in [-1, 1]
        - output ``[T, N, ...]`` of -1, 0 and 1, in the input's dtype

    Raises:
        ValueError: a pixel outside [-1, 1], or not a number.
    """

    def __init__(self, T: int, generator: torch.Generator | None = None) -> None:
        super().__init__(T)
        self.generator = generator

    def steps(self, images: Tensor, steps: int) -> Tensor:
        magnitude = images.abs()
        if images.numel() and not bool(magnitude.amax() <= 1):  # a NaN fails the comparison too
            raise ValueError(
                f"PoissonEncoder needs pixels in [-1, 1], got values from {images.amin().item():.4g} to "
                f"{images.amax().item():.4g}; normalise with mean 0.5 and std 0.5 per channel"
            )
        # float32 draws whatever the images' dtype: a coarser u would distort small rates.
        u = torch.rand(
            (steps, *images.shape), generator=self.generator, device=images.device, dtype=torch.float32
        )
        return (u <= magnitude).to(images.dtype).mul_(images.sign())


class DirectEncoder(_Encoder):
    """Direct code: the same real-valued image at every step; the first convolution and neuron encode it.

    The output is a view with time stride 0, nothing is copied, and the networks of
    :mod:`lasnn_sj.models` compute their first convolution once instead of ``T`` times.

    Args:
        T: number of time steps.

    Shape:
        - input ``[N, ...]``
        - output ``[T, N, ...]``, in the input's dtype
    """

    def steps(self, images: Tensor, steps: int) -> Tensor:
        return images.unsqueeze(0).expand(steps, *images.shape)
