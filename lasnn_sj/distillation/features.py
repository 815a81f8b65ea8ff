"""Distillation of features: what layers of student and teacher make of a batch, compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter, is_lazy

from .logits import check_weights
from .objective import Look, Needs, Objective, Signals
from .pairs import Pair, as_map, choose_layers, choose_pairs
from .taps import StudentTaps, TapError, TeacherTaps


class LateWeights(nn.Module):
    """Weights whose shapes are known once an objective has seen the networks.

    Until then they have no shape; loading a state gives them that of the state.

    Args:
        *names: of the weights.
    """

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            weight = UninitializedParameter()
            weight.late = True  # not counted in a run's settings, which are written before there is a shape
            self.register_parameter(name, weight)
        self.register_load_state_dict_pre_hook(self._take_shapes)

    def build(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Draw the weights as PyTorch draws those of a layer, or check those that are there.

        Vectors are zero, or one where their name begins with "scale"; a weight that is not needed has the
        shape ``(0,)``.

        Raises:
            ValueError: a weight is there already and of another shape.
        """
        for name, shape in shapes.items():
            weight = self.get_parameter(name)
            if is_lazy(weight):
                weight.materialize(tuple(shape))
                if weight.dim() == 1:
                    nn.init.constant_(weight, float(name.startswith("scale")))
                else:
                    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            elif tuple(weight.shape) != tuple(shape):
                raise ValueError(
                    f"the objective's weight '{name}' has shape {tuple(weight.shape)}, the layers of "
                    f"these networks need {tuple(shape)}; make a new objective for them"
                )

    @staticmethod
    def _take_shapes(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        for name, weight in module.named_parameters(recurse=False):
            if is_lazy(weight) and prefix + name in state:
                weight.materialize(state[prefix + name].shape)


class _OnePair(Objective):
    """Base of objectives on one pair of layers: the given, or those of the highest level."""

    needs_teacher = True
    _pair: Pair | None = None

    def prepare(self, look: Look) -> Needs:
        """Choose the pair of layers and ask for them.

        Raises:
            TapError: no layer to choose, or a name that does not fit.
        """
        pair = self.choose(look)
        return Needs(student=((pair.student, "firing_rate"),), teacher=(pair.teacher,))

    def choose(self, look: Look) -> Pair:
        """Choose the pair of layers, and keep it for the steps."""
        names = None if self.pair is None else [_pair_of_names(self.pair)]
        self._pair = choose_pairs(look.student, look.teacher, look.inputs, look.images, names)[-1]
        return self._pair

    def channels(self, look: Look) -> tuple[int, int]:
        """Return the channels of the student's and of the teacher's layer."""
        rates, features = self.maps(_read(look, self._pair))
        return rates.shape[1], features.shape[1]

    def maps(self, signals: Signals) -> tuple[Tensor, Tensor]:
        """Return the student's firing rates and the teacher's features at their size, ``[N, C, H, W]``."""
        pair = self._pair
        rates = as_map(signals.student[pair.student, "firing_rate"], pair.size, pair.form)
        features = as_map(signals.teacher[pair.teacher], pair.teacher_size, pair.teacher_form)
        return rates, F.adaptive_avg_pool2d(features.detach().to(rates.dtype), pair.size)


@dataclass(repr=False, eq=False)
class KDSNN(_OnePair, LateWeights):
    """Distillation of features (KDSNN; Xu et al., CVPR 2023), added to a cross-entropy.

    ``alpha * mean of (F - A r)^2`` with the teacher's features ``F`` at the student's size, the student's
    firing rates ``r``, and a 1x1 convolution ``A`` that is trained with the student. As described in the
    abstract and in later papers; one pair of layers, the mean and the weight are assumed (in its comparison
    BKDSNN's code has ``7e-5 / N`` times the sum of the squares). The paper's second part, its logits, is
    :class:`LabelKD`.

    Args:
        alpha: weight, at least 0.
        pair: ``(student module, teacher module)``; of the highest level if not given.
    """

    alpha: float = 1.0
    pair: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_weights(self, "alpha")
        LateWeights.__init__(self, "adaptor")

    def prepare(self, look: Look) -> Needs:
        """Choose the pair, and make the adaptor for its channels."""
        needs = super().prepare(look)
        mine, theirs = self.channels(look)
        self.build({"adaptor": (theirs, mine, 1, 1)})
        return needs

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"features": alpha * mean square}``."""
        rates, features = self.maps(signals)
        return {"features": self.alpha * F.mse_loss(F.conv2d(rates, self.adaptor), features)}


@dataclass(repr=False, eq=False)
class BKD(_OnePair, LateWeights):
    """Blurred distillation (BKDSNN; Xu et al., ECCV 2024), added to a cross-entropy.

    ``alpha / N * || G(M * A r) - F * max(A r) / max F ||^2`` with firing rates ``r``, the teacher's features
    ``F``, a 1x1 convolution ``A`` where their numbers of channels differ, and a mask ``M`` that drops each
    channel of a sample with probability ``drop``. ``G``, trained with the student as ``A`` is, restores what
    was dropped: two 3x3 convolutions with a ReLU between. The maxima are over the batch. As in the authors'
    code for ResNets; one pair of layers and averaged teacher features where the sizes differ are ours.

    Args:
        alpha: weight, at least 0.
        drop: probability, in [0, 1).
        pair: ``(student module, teacher module)``; of the highest level if not given.
    """

    alpha: float = 7e-5
    drop: float = 0.15
    pair: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_weights(self, "alpha", "drop")
        if self.drop >= 1:
            raise ValueError(f"drop must lie in [0, 1), got {self.drop}")
        LateWeights.__init__(self, "adaptor", "bias", "first", "first_bias", "second", "second_bias")

    def prepare(self, look: Look) -> Needs:
        """Choose the pair, and make the convolutions for its channels."""
        needs = super().prepare(look)
        mine, theirs = self.channels(look)
        self.build({
            "adaptor": (theirs, mine, 1, 1) if mine != theirs else (0,),
            "bias": (theirs if mine != theirs else 0,),
            "first": (theirs, theirs, 3, 3), "first_bias": (theirs,),
            "second": (theirs, theirs, 3, 3), "second_bias": (theirs,),
        })  # fmt: skip
        return needs

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"blurred": alpha / N * squared norm}``."""
        rates, features = self.maps(signals)
        if self.adaptor.numel():
            rates = F.conv2d(rates, self.adaptor, self.bias)
        target = features / features.amax().clamp(min=torch.finfo(features.dtype).tiny) * rates.amax()
        kept = torch.rand(rates.shape[:2], device=rates.device) >= self.drop
        restored = F.conv2d(rates * kept[:, :, None, None], self.first, self.first_bias, padding=1).relu()
        restored = F.conv2d(restored, self.second, self.second_bias, padding=1)
        return {"blurred": self.alpha / len(rates) * (restored - target).square().sum()}


@dataclass(repr=False)
class RelationalKD(_OnePair):
    """Relational distillation (RKD; Park et al., CVPR 2019), added to a cross-entropy.

    Distances and angles between the samples of a batch are compared, so layers of any widths fit. With a
    layer's mean over space as embedding ``e``: distances ``|e_i - e_j|`` divided by their mean, and cosines
    of the angles ``e_i e_j e_k``; Huber loss between student and teacher of both. Form and defaults are those
    of the authors' code and of mdistiller for classification.

    Args:
        distance: weight of the distances, at least 0.
        angle: weight of the angles, at least 0.
        pair: ``(student module, teacher module)``; of the highest level if not given.
    """

    distance: float = 25.0
    angle: float = 50.0
    pair: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_weights(self, "distance", "angle")

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"distances": distance * ..., "angles": angle * ...}``; 0 of a batch of one."""
        mine, theirs = (x.mean((2, 3)) for x in self.maps(signals))
        distances = F.smooth_l1_loss(_distances(mine), _distances(theirs))
        angles = F.smooth_l1_loss(_angles(mine), _angles(theirs))
        return {"distances": self.distance * distances, "angles": self.angle * angles}


@dataclass(repr=False)
class StableSpike(Objective):
    """Spikes drawn to those that two steps share (first part of Stable Spike; CVPR 2026), added to a CE.

    ``alpha * mean of (mean over t of S_t - mean over t < T of (S_t and S_t+1))^2`` with a layer's spikes
    ``S``; the shared spikes are a constant, which is assumed. The paper's second part is
    :class:`StableNoise`. Needs no teacher.

    Args:
        alpha: weight, at least 0; the paper's 1.
        layer: the student's module; of the highest level if not given.
    """

    alpha: float = 1.0
    layer: str | None = None
    _name = None

    def __post_init__(self) -> None:
        check_weights(self, "alpha")

    def prepare(self, look: Look) -> Needs:
        """Choose the layer and ask for its spikes.

        Raises:
            TapError: no layer to choose, or a layer that does not exist.
            ValueError: a single time step.
        """
        if len(look.inputs) < 2:
            raise ValueError("StableSpike needs T of at least 2, got T = 1")
        names = dict(look.student.named_modules())
        if self.layer is not None and self.layer not in names:
            raise TapError(f"student tap '{self.layer}' matches no module of {type(look.student).__name__}")
        self._name = self.layer or choose_layers(look.student, look.inputs)[-1].student
        return Needs(student=((self._name, "spikes"),))

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"stable": alpha * mean square}``."""
        spikes = signals.student[self._name, "spikes"]
        shared = shared_spikes(spikes).detach().mean(0)
        return {"stable": self.alpha * F.mse_loss(spikes.mean(0), shared)}


def shared_spikes(spikes: Tensor) -> Tensor:
    """Return the spikes that a step shares with the next, ``S_t and S_t+1``.

    Args:
        spikes: ``[T, N, ...]``, 0 or one other value, such as that of dropout.

    Returns:
        ``[T - 1, N, ...]``, 0 or the same value.
    """
    return spikes[:-1] * spikes[1:] / spike_value(spikes)


def spike_value(spikes: Tensor) -> Tensor:
    """Return the value of a spike, a scalar; without spikes the smallest positive number."""
    return spikes.detach().amax().clamp(min=torch.finfo(spikes.dtype).tiny)


def _distances(e: Tensor) -> Tensor:
    """Compute the distances of all pairs of samples divided by their mean, ``[N, N]``; 0 if all are equal."""
    square = (e.unsqueeze(0) - e.unsqueeze(1)).square().sum(2)
    other = square > 0
    distances = torch.where(other, square, 1.0).sqrt() * other  # sqrt has no gradient at 0
    return distances / (distances.sum() / other.sum().clamp(min=1)).clamp(min=torch.finfo(e.dtype).tiny)


def _angles(e: Tensor) -> Tensor:
    """Compute the cosines of the angles at ``i`` between the directions to ``j`` and ``k``, ``[N, N, N]``."""
    directions = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), dim=2)
    return torch.einsum("ijc,ikc->ijk", directions, directions)


def _pair_of_names(pair: object) -> tuple[str, str]:
    if isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(name, str) for name in pair):
        return tuple(pair)
    raise ValueError(f"pair must be (student module, teacher module), such as ('features.0', 'layer1'), "
                     f"got {pair!r}")  # fmt: skip


@torch.no_grad()
def _read(look: Look, pair: Pair) -> Signals:
    """Read the signals of a pair's layers for the look's batch."""
    signals = Signals(look.outputs, torch.empty(0))
    wanted = (pair.student, "firing_rate")
    mine, theirs = StudentTaps(look.student, [wanted]), TeacherTaps(look.teacher, [pair.teacher])
    functional.reset_net(look.student)
    try:
        with mine:
            look.student(look.inputs)
            signals.student = {wanted: mine.collect()[0]}
        with theirs:
            look.teacher(look.images)
            signals.teacher = theirs.collect()
    finally:
        functional.reset_net(look.student)
        mine.close(), theirs.close()
    return signals
