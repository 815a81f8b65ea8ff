"""Distillation through a classifier: methods that read the last linear layer of teacher or student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from .features import LateWeights, _OnePair, shared_spikes, spike_value
from .logits import check_weights, divergence, same_classes
from .objective import Look, Needs, Objective, Signals
from .pairs import Form, spiking_layer
from .taps import StudentTaps


@dataclass(repr=False)
class SAMD(_OnePair):
    """Saliency-scaled activation maps (SAMD, part of CKDSNN; AAAI 2026), added to a cross-entropy.

    ``alpha * KL(s(CAM) || s(SAM))``, ``s = softmax(. / tau)`` over the positions. ``SAM`` is the number of
    spikes of a layer at each position, over steps and channels; ``CAM`` the teacher's class activation map
    of the label ``y``, the sum over channels of ``W[y, c] * F_c`` with the weights ``W`` of its last linear
    layer. As described in secondary sources; the class and the layer are assumed.

    Args:
        alpha: weight, at least 0; ``tau^2`` at its default.
        temperature: ``tau``, above 0.
        pair: ``(student module, teacher module)``; of the highest level if not given. The teacher's layer
            must have as many channels as its last linear layer has inputs.
    """

    alpha: float = 4.0
    temperature: float = 2.0
    pair: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_weights(self, "alpha")

    def prepare(self, look: Look) -> Needs:
        """Choose the pair, and find the teacher's classifier.

        Raises:
            ValueError: the teacher's classifier does not fit its layer or the student's classes.
        """
        needs = super().prepare(look)
        _, channels = self.channels(look)
        linear = classifier(look.teacher)[1]
        if linear is None or linear.weight.shape != (look.num_classes, channels):
            raise ValueError(
                f"SAMD needs a teacher whose last linear layer has weights ({look.num_classes}, {channels}): "
                f"the student's classes by the channels of '{self._pair.teacher}'; the teacher has "
                f"{_described(look.teacher)}. Give pair=(student module, teacher module) with the teacher's "
                f"last feature map"
            )
        self._weight = linear.weight
        self._steps = len(look.inputs)
        return needs

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"saliency": alpha * KL}``."""
        rates, features = self.maps(signals)
        weight = self._weight.detach().to(features.dtype)[signals.labels]
        cam = torch.einsum("nc,nchw->nhw", weight, features).flatten(1) / self.temperature
        sam = self._steps * rates.sum(1).flatten(1) / self.temperature
        target = F.log_softmax(cam, dim=1)
        each = (target.exp() * (target - F.log_softmax(sam, dim=1))).sum(1)
        return {"saliency": self.alpha * each.mean()}


@dataclass(repr=False, eq=False)
class EnOF(Objective, LateWeights):
    """The student's last features through the teacher's own classifier (EnOF-SNN; Guo et al., NeurIPS 2024).

    ``alpha * tau^2 * KL(s(z_A) || s(W r + b))``, ``s = softmax(. / tau)``, added to a cross-entropy: ``W``
    and ``b`` are the teacher's last linear layer, a constant, ``z_A`` its logits, and ``r`` the firing rates
    of the student's last spiking layer, averaged over positions. As described in the abstract, whose loss is
    called ``L_AF``; the weight and the temperature are assumed. Where the student has another number of
    features than the teacher's classifier takes, a linear map that is trained with it comes between, which
    is ours. The paper's other part, a ReLU in place of the last spiking layer, is a change of the student.

    Args:
        alpha: weight, at least 0.
        temperature: ``tau``, above 0.
        layer: the student's module; the last spiking one before its last linear layer if not given.
    """

    alpha: float = 1.0
    temperature: float = 1.0
    layer: str | None = None

    needs_teacher = True

    def __post_init__(self) -> None:
        check_weights(self, "alpha")
        LateWeights.__init__(self, "adaptor")

    def prepare(self, look: Look) -> Needs:
        """Find the student's features and the teacher's classifier, and make the map between.

        Raises:
            TapError: no such layer.
            ValueError: the teacher's last linear layer does not give the student's classes.
        """
        linear = classifier(look.teacher)[1]
        if linear is None or linear.out_features != look.num_classes:
            raise ValueError(
                f"EnOF needs a teacher whose last linear layer gives the student's {look.num_classes} "
                f"classes; the teacher has {_described(look.teacher)}"
            )
        self._name, self._form = spiking_layer(look.student, look.inputs, self.layer)
        mine = _positions_averaged(_spikes(look, self._name).mean(0), self._form).shape[1]
        self.build({"adaptor": (linear.in_features, mine) if mine != linear.in_features else (0,)})
        self._linear = (linear.weight, linear.bias)  # a tuple: no part of this module
        return Needs(teacher_logits=True, student=((self._name, "firing_rate"),))

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"output_features": alpha * tau^2 * KL}``."""
        teacher = same_classes(signals.scores, signals.teacher_logits, "EnOF")
        features = _positions_averaged(signals.student[self._name, "firing_rate"], self._form)
        if self.adaptor.numel():
            features = F.linear(features, self.adaptor)
        weight, bias = self._linear
        bias = None if bias is None else bias.to(features.dtype)
        z = F.linear(features, weight.to(features.dtype), bias)
        each = divergence(teacher, z, self.temperature)
        return {"output_features": self.alpha * self.temperature**2 * each.mean()}


@dataclass(repr=False)
class StableNoise(Objective):
    """Predictions that noise in the shared spikes leaves alone (second part of Stable Spike; CVPR 2026).

    ``alpha * tau^2 * KL(s(z) || s(z_noise))``, ``s = softmax(. / tau)``, added to a cross-entropy and
    :class:`StableSpike`. With the spikes ``S`` of the layer that the student's classifier reads,
    ``P = mean over t < T of (S_t and S_t+1)`` and ``eps ~ Bernoulli(P)``, ``z_noise`` are the class scores
    that the classifier makes of the rates ``P + eps``. As described in a summary of the paper; that ``z`` is
    a constant is assumed. Needs no teacher, but a student that ends in one linear layer on the spikes of one
    layer, averaged over positions or not.

    Args:
        alpha: weight, at least 0; the paper's 1.
        temperature: ``tau``, above 0.
        layer: the student's module; the last spiking one before its last linear layer if not given.
    """

    alpha: float = 1.0
    temperature: float = 2.0
    layer: str | None = None

    def __post_init__(self) -> None:
        check_weights(self, "alpha")

    def prepare(self, look: Look) -> Needs:
        """Find the classifier and the layer that it reads.

        Raises:
            TapError: no such layer.
            ValueError: a single time step, or class scores that are not one linear layer of these spikes.
        """
        if len(look.inputs) < 2:
            raise ValueError("StableNoise needs T of at least 2, got T = 1")
        self._name, self._form = spiking_layer(look.student, look.inputs, self.layer)
        self._linear, steps = classifier(look.student)[1], len(look.inputs)
        spikes, outputs = _random_spikes(look, self._name)
        scores = outputs.mean(0) if outputs.dim() == 3 else outputs
        last = outputs[-1] if outputs.dim() == 3 else outputs
        made = self._classify(spikes.mean(0))
        fits = made is not None and made.shape == scores.shape
        if fits and torch.allclose(made, scores, 1e-2, 1e-4):
            self._factor = 1
        elif fits and torch.allclose(steps * made, last, 1e-2, 1e-4):
            self._factor = steps  # of a student whose output adds up over time
        else:
            raise ValueError(
                f"StableNoise needs a student whose class scores are one linear layer of the firing rates of "
                f"'{self._name}'; those of {type(look.student).__name__}, whose last linear layer is "
                f"{_described(look.student)}, are not. Give layer= or leave StableNoise out"
            )
        return Needs(student=((self._name, "spikes"),))

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"noise": alpha * tau^2 * KL}``."""
        spikes = signals.student[self._name, "spikes"]
        shared, value = shared_spikes(spikes).mean(0), spike_value(spikes)
        noise = value * torch.bernoulli((shared.detach() / value).clamp(max=1))
        noisy = self._factor * self._classify(shared + noise)
        each = divergence(signals.scores.detach(), noisy, self.temperature)
        return {"noise": self.alpha * self.temperature**2 * each.mean()}

    def _classify(self, rates: Tensor) -> Tensor | None:
        """Return the classifier's output for a layer's rates; ``None`` if it does not accept them."""
        for features in (_positions_averaged(rates, self._form), rates.flatten(1)):
            if self._linear is not None and features.shape[1] == self._linear.in_features:
                weight, bias = self._linear.weight, self._linear.bias
                bias = None if bias is None else bias.to(features.dtype)
                return F.linear(features, weight.to(features.dtype), bias)
        return None


def classifier(network: nn.Module) -> tuple[str, nn.Linear | None]:
    """Name and module of a network's last linear layer; ``None`` if it has none."""
    linear = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else ("", None)


def _described(network: nn.Module) -> str:
    name, linear = classifier(network)
    return "no linear layer" if linear is None else f"'{name}' {tuple(linear.weight.shape)}"


def _positions_averaged(x: Tensor, form: Form) -> Tensor:
    """Average over the positions of a map or of tokens, ``[N, C]``; features ``[N, C]`` are unchanged."""
    if x.dim() == 2:
        return x
    return x.mean(1) if form == "NLC" else x.flatten(2).mean(2)


@torch.no_grad()
def _spikes(look: Look, name: str) -> Tensor:
    """Return the spikes of a layer for the look's batch, ``[T, N, ...]``."""
    taps = StudentTaps(look.student, [(name, "spikes")])
    functional.reset_net(look.student)
    try:
        with taps:
            look.student(look.inputs)
            return taps.collect()[0]
    finally:
        functional.reset_net(look.student)
        taps.close()


@torch.no_grad()
def _random_spikes(look: Look, name: str) -> tuple[Tensor, Tensor]:
    """Run the student with random spikes in place of those of every layer; a layer's, and the output.

    An untrained layer may be silent, and its spikes say nothing of what is behind them then.
    """
    seen: dict[nn.Module, Tensor] = {}

    def replace(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        seen[module] = torch.bernoulli(torch.full_like(output, 0.5))
        return seen[module]

    wanted, kinds = look.student.get_submodule(name), (neuron.BaseNode, neuron.SimpleBaseNode)
    modules = [m for m in look.student.modules() if isinstance(m, kinds) or m is wanted]
    hooks = [module.register_forward_hook(replace) for module in modules]
    functional.reset_net(look.student)
    try:
        outputs = look.student(look.inputs)
    finally:
        functional.reset_net(look.student)
        for hook in hooks:
            hook.remove()
    return seen[wanted].float(), outputs.float()
