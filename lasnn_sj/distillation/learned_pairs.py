"""Distillation of features between layers whose pairing is learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .features import LateWeights, _read
from .logits import check_weights, divergence, same_classes
from .objective import Look, Needs, Objective, Signals
from .pairs import as_map, choose_pairs

_LEVELS = range(3)
_WEIGHTS = (
    *(f"{part}{i}{j}" for i in _LEVELS for j in _LEVELS for part in ("conv", "scale", "shift", "project")),
    *(f"{part}{i}" for i in _LEVELS for side in ("key", "query")
      for part in (side, f"{side}_bias", f"{side}_out", f"{side}_out_bias")),
)  # fmt: skip


@dataclass(repr=False, eq=False)
class SASTC(Objective, LateWeights):
    """Self-attentive spatio-temporal calibration (SASTC; Hong and Wang, AAAI 2025), added to a cross-entropy.

    Each layer ``i`` of the student imitates each layer ``j`` of the teacher as far as a learned attention
    says, step by step:

    ``alpha * tau^2 * KL(s(z_A) || s(z)) + beta * mean over t, n, i of sum over j of
    a_tnij * mean of (R_ij(S_ti)_n - F_jn)^2``

    with spikes ``S_ti``, the teacher's features ``F_j``, ``s = softmax(. / tau)`` and
    ``a_tni. = softmax over j of q_tin . k_jn``. Queries and keys are what two linear layers with a ReLU
    between make of a row of the ``[N, N]`` inner products of the samples' spikes or features, of length 1.
    ``R_ij`` is a 3x3 convolution to twice the teacher's channels, batch norm over each step, a ReLU and a 1x1
    convolution. The larger of two maps is brought to the size of the smaller: the student's by its maxima,
    the teacher's by its means. Form and defaults are those of the authors' code; the layers are those of the
    low, middle and high level here.

    Args:
        alpha: weight of the logits, at least 0.
        beta: weight of the features, at least 0; the code's default, its script for WRN-16-2 has 800.
        temperature: ``tau``, above 0.
        batch_size: samples of the largest batch of a process, at least 4, which is the length of the rows.
            Those of smaller batches are filled up with zeros; the authors' code leaves such batches out.
    """

    alpha: float = 1.0
    beta: float = 100.0
    temperature: float = 4.0
    batch_size: int = 128

    needs_teacher = True

    def __post_init__(self) -> None:
        check_weights(self, "alpha", "beta")
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 4:
            raise ValueError(f"batch_size must be a whole number, at least 4, got {self.batch_size!r}")
        LateWeights.__init__(self, *_WEIGHTS)

    def prepare(self, look: Look) -> Needs:
        """Choose the layers and make the weights for them.

        Raises:
            TapError: no layer to choose.
        """
        self._pairs = choose_pairs(look.student, look.teacher, look.inputs, look.images)
        mine, theirs = [], []
        for pair in self._pairs:
            read = _read(look, pair)
            mine.append(as_map(read.student[pair.student, "firing_rate"], pair.size, pair.form).shape[1])
            theirs.append(as_map(read.teacher[pair.teacher], pair.teacher_size, pair.teacher_form).shape[1])
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_WEIGHTS, (0,))
        wide = self.batch_size // 4
        for i in range(len(mine)):
            for side in ("key", "query"):
                shapes |= {
                    f"{side}{i}": (2 * wide, self.batch_size), f"{side}_bias{i}": (2 * wide,),
                    f"{side}_out{i}": (wide, 2 * wide), f"{side}_out_bias{i}": (wide,),
                }  # fmt: skip
            for j, channels in enumerate(theirs):
                shapes |= {
                    f"conv{i}{j}": (2 * channels, mine[i], 3, 3), f"scale{i}{j}": (2 * channels,),
                    f"project{i}{j}": (channels, 2 * channels, 1, 1), f"shift{i}{j}": (2 * channels,),
                }  # fmt: skip
        self.build(shapes)
        return Needs(
            teacher_logits=True,
            student=tuple((pair.student, "spikes") for pair in self._pairs),
            teacher=tuple(pair.teacher for pair in self._pairs),
        )

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"kd": alpha * tau^2 * KL, "calibrated": beta * ...}``.

        Raises:
            ValueError: a batch of more than ``batch_size`` samples.
        """
        N = len(signals.labels)
        if N > self.batch_size:
            raise ValueError(f"SASTC got a batch of {N} samples; give it batch_size={N}")
        teacher = same_classes(signals.scores, signals.teacher_logits, "SASTC")
        kd = divergence(teacher, signals.scores, self.temperature).mean()
        spikes, features = self._maps(signals)
        keys = torch.stack([self._embed("key", j, _products(f)) for j, f in enumerate(features)], 1)
        queries = [self._embed("query", i, _products(s)) for i, s in enumerate(spikes)]
        attention = (torch.stack(queries, 2) @ keys.transpose(1, 2)).softmax(3)  # [T, N, i, j]
        distances = torch.stack([
            torch.stack([self._distance(s, f, f"{i}{j}") for j, f in enumerate(features)], 2)
            for i, s in enumerate(spikes)
        ], 2)  # fmt: skip
        calibrated = (attention * distances).sum(3).mean()
        return {"kd": self.alpha * self.temperature**2 * kd, "calibrated": self.beta * calibrated}

    def _maps(self, signals: Signals) -> tuple[list[Tensor], list[Tensor]]:
        """Return the spikes ``[T, N, C, H, W]`` and features ``[N, C, H, W]`` of the layers."""
        spikes, features = [], []
        for pair in self._pairs:
            one = signals.student[pair.student, "spikes"]
            one = one.to(torch.promote_types(one.dtype, torch.float32))
            spikes.append(as_map(one.flatten(0, 1), pair.size, pair.form).unflatten(0, one.shape[:2]))
            other = signals.teacher[pair.teacher].detach().to(one.dtype)
            features.append(as_map(other, pair.teacher_size, pair.teacher_form))
        return spikes, features

    def _embed(self, side: str, number: int, products: Tensor) -> Tensor:
        """Compute the query or key of length 1 of each row of ``[..., N, N]``."""
        first, bias, second, second_bias = (
            self.get_parameter(f"{side}{part}{number}") for part in ("", "_bias", "_out", "_out_bias")
        )
        rows = F.pad(products, (0, self.batch_size - products.shape[-1]))
        return F.normalize(F.linear(F.linear(rows, first, bias).relu(), second, second_bias), dim=-1)

    def _distance(self, spikes: Tensor, features: Tensor, number: str) -> Tensor:
        """Compute the mean square of ``R(spikes) - features``, ``[T, N]``."""
        conv, scale, shift, project = (
            self.get_parameter(part + number) for part in ("conv", "scale", "shift", "project")
        )
        T, N = spikes.shape[:2]
        x = spikes.flatten(0, 1)
        if x.shape[2] > features.shape[2]:
            x = F.adaptive_max_pool2d(x, features.shape[2:])
        else:
            features = F.adaptive_avg_pool2d(features, x.shape[2:])
        x = F.conv2d(x, conv, padding=1).unflatten(0, (T, N))
        x = x.transpose(0, 1).flatten(1, 2)  # the channels of each step are normalised by themselves
        x = F.batch_norm(x, None, None, scale.repeat(T), shift.repeat(T), training=True).relu()
        x = x.unflatten(1, (T, -1)).transpose(0, 1).flatten(0, 1)
        x = F.conv2d(x, project).unflatten(0, (T, N))
        return (x - features).square().flatten(2).mean(2)


def _products(x: Tensor) -> Tensor:
    """Compute the inner products of the samples, ``[..., N, N]``, of ``[..., N, C, H, W]``."""
    x = x.flatten(-3)
    return x @ x.transpose(-1, -2)
