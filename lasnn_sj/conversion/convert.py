"""Conversion of an ANN to an SNN with the same weights, and threshold balancing (LaSNN, Section III-D)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import base, functional, layer
from torch import Tensor, nn

from ..models.layers import Conv2d
from ..models.readout import class_scores, resolve_readout
from ..models.resnet import Block
from ..neurons import IntegratorNode, LIFNode, TimeLoopNode
from ..neurons.layout import use_channels_last
from ..neurons.sequential import join_pools
from ..runtime.progress import progress_bar

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_MAX_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.FractionalMaxPool2d)


class ConversionError(ValueError):
    """The network cannot be converted; the message names the layer and a remedy."""


def convert(ann: nn.Module, leak: float = 0.99) -> nn.Module:
    """Convert an ANN to an SNN with the same structure and weights.

    Every ``nn.ReLU`` becomes a :class:`~lasnn_sj.neurons.LIFNode` with threshold 1, to be set by
    :func:`balance_thresholds`, and the output integrates its input (Eq. 3). The ANN may be a network of
    :mod:`lasnn_sj.models` or any other that is built of modules, with one ReLU module for each use.

    Args:
        ann: a network of bias-free convolutions and linear layers, ReLU, average pooling, dropout.
        leak: leak of the neurons; 1 for pure conversion.

    Returns:
        A new network, ``[T, N, ...]`` to ``[T, N, K]``, in the ANN's training or evaluation mode, its
        convolutions' weights in channels_last. A network without a ``readout`` of its own is wrapped as
        ``nn.Sequential(network, integrator)``.

    Raises:
        ConversionError: a bias, batch norm, max pooling, another nonlinearity, a ReLU module in two places,
            a layer without a multi-step form, or no ReLU at all.
    """
    check_convertible(ann)
    body = copy.deepcopy(ann)
    forms: dict[nn.Module, nn.Module | None] = {}
    for name, module in list(body.named_modules(remove_duplicate=False)):
        if module not in forms:  # a pool that is used in two places stays one module
            forms[module] = _spiking_form(module, leak)
        new = forms[module]
        if new is None:
            continue
        if not name:
            body = new
        else:
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, new)
    if isinstance(getattr(body, "readout", None), nn.Identity):
        body.readout = IntegratorNode(step_mode="m")
        snn = body
    else:
        snn = nn.Sequential(body, IntegratorNode(step_mode="m"))
    functional.set_step_mode(snn, "m")
    join_pools(snn)
    use_channels_last(snn)
    snn.train(ann.training)
    functional.invalidate_reset_cache(snn)
    if "spiking" in getattr(body, "architecture", {}).get("arguments", {}):
        body.architecture["arguments"] |= {"spiking": True, "leak": leak}
    return snn


def check_convertible(ann: nn.Module, normalized: bool = False) -> None:
    """Raise :class:`ConversionError` for a network with layers that have no spiking form.

    Args:
        ann: the network.
        normalized: allow batch norm, biases, and layers without a multi-step form.
    """
    if not isinstance(ann, nn.Module):
        raise ConversionError(f"ann must be a network (torch.nn.Module), got {ann!r}")
    relus: dict[nn.Module, str] = {}
    for name, module in ann.named_modules(remove_duplicate=False):
        where = f"layer '{name}' ({type(module).__name__})"
        if isinstance(module, _MAX_POOLS):
            raise ConversionError(
                f"{where} takes a maximum, which loses information on spikes: train the ANN with average "
                f"pooling (nn.AvgPool2d)"
            )
        if isinstance(module, nn.ReLU):
            if module in relus:
                raise ConversionError(
                    f"{where} is the same module as layer '{relus[module]}': a neuron keeps the state of one "
                    f"layer, so use one nn.ReLU for each"
                )
            relus[module] = name
        elif type(module).__module__ == "torch.nn.modules.activation":
            raise ConversionError(f"{where} has no spiking form: train the ANN with nn.ReLU")
        elif isinstance(module, base.MemoryModule) and not isinstance(module, layer.Dropout):
            raise ConversionError(f"{where} is a spiking layer already: convert takes an ANN")
        elif not normalized:
            _check_plain(module, where)
    if not relus:
        raise ConversionError(
            f"{type(ann).__name__} has no nn.ReLU module to turn into neurons; a functional F.relu cannot "
            f"be found, use one nn.ReLU module for each"
        )


def _check_plain(module: nn.Module, where: str) -> None:
    """Raise for normalization, biases and layers without a multi-step form."""
    if isinstance(module, _NORMS):
        raise ConversionError(
            f"{where} normalizes, which a spiking layer without bias cannot do: train the "
            f"intermediate ANN without normalization (see lasnn_sj.models)"
        )
    if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return
    if module.bias is not None:
        raise ConversionError(
            f"{where} has a bias, which threshold balancing cannot scale: train the ANN with bias=False"
        )
    if not (type(module) in (nn.Conv2d, nn.Linear) or isinstance(module, base.StepModule)):
        raise ConversionError(f"{where} has no multi-step form: use nn.Conv2d or nn.Linear, not a subclass")


def _spiking_form(module: nn.Module, leak: float) -> nn.Module | None:
    """Return SpikingJelly's multi-step form of a stock layer, or ``None`` to keep the layer."""
    if isinstance(module, nn.ReLU):
        return LIFNode(leak=leak, step_mode="m")
    if isinstance(module, base.StepModule):
        return None
    if type(module) is nn.Conv2d:
        new = Conv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
            module.dilation, module.groups, False, module.padding_mode, step_mode="m",
        )  # fmt: skip
        new.weight = module.weight
        return new
    if type(module) is nn.Linear:
        new = layer.Linear(module.in_features, module.out_features, bias=False, step_mode="m")
        new.weight = module.weight
        return new
    if type(module) is nn.AvgPool2d:
        return layer.AvgPool2d(
            module.kernel_size, module.stride, module.padding, module.ceil_mode,
            module.count_include_pad, module.divisor_override, step_mode="m",
        )  # fmt: skip
    if type(module) is nn.AdaptiveAvgPool2d:
        return layer.AdaptiveAvgPool2d(module.output_size, step_mode="m")
    if type(module) is nn.Flatten:
        return layer.Flatten(module.start_dim, module.end_dim, step_mode="m")
    if isinstance(module, (nn.Dropout, nn.Dropout2d)):
        kind = layer.Dropout2d if isinstance(module, nn.Dropout2d) else layer.Dropout
        return kind(module.p, step_mode="m")
    return None


class _Stop(Exception):
    """End a forward pass at the neuron whose input is measured."""


def balance_thresholds(
    snn: nn.Module,
    images: Tensor,
    encoder: nn.Module,
    statistic: Literal["max"] | float = "max",
    scale: float = 1.0,
    stem_only: bool = False,
    chunk: int = 4,
    progress: bool = False,
) -> dict[str, float]:
    """Balance thresholds in the spiking domain (LaSNN, Section III-D).

    Layers are balanced in the order in which they run, with the thresholds of earlier layers already set.
    The ``v_threshold`` of layer ``l`` becomes the maximum of its weighted input per step over the batch and
    ``encoder.T`` steps; the leak is 1 meanwhile. Time is processed in chunks, so memory does not grow with
    ``T``. Dropout is off. Training modes and leaks are restored afterwards and the states are reset.

    Args:
        snn: a network of this package's neurons in multi-step mode, such as :func:`convert` returns.
        images: one batch ``[N, C, H, W]`` for the encoder; the paper takes 512 images.
        encoder: its ``T`` is the number of steps; the paper takes 2500.
        statistic: ``"max"``, or a percentile in (0, 100] of each step's inputs, of which the maximum over
            the steps is taken.
        scale: factor of all thresholds in the end; Rathi et al. use 0.7 before training.
        stem_only: balance only the neurons outside residual blocks and leave those inside at 1 (before
            ``scale``), as Rathi et al. do.
        chunk: number of time steps in memory at once.
        progress: show a progress bar.

    Returns:
        The thresholds by module name, in the order in which the layers run.

    Raises:
        ValueError: a statistic, scale or chunk out of range, no neuron, a neuron that runs twice, or a
            layer whose input is never above 0. Thresholds are then left unchanged.
    """
    if statistic != "max" and not (isinstance(statistic, (int, float)) and 0 < statistic <= 100):
        raise ValueError(f'statistic must be "max" or a percentile in (0, 100], got {statistic!r}')
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 time step, got {chunk}")
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images must be one batch [N, C, H, W], got a {type(images).__name__}; of a loader give the "
            f"images of next(iter(loader))"
        )
    if images.dim() < 2 or len(images) < 1:
        raise ValueError(
            f"images must be a batch [N, ...] with at least one image, got shape {tuple(images.shape)}"
        )
    reduce = _reduction(statistic)
    before = {m: (m.v_threshold, m.leak) for m in snn.modules() if isinstance(m, TimeLoopNode)}
    blocks = [m for m in snn.modules() if isinstance(m, Block)]
    scales = {block: block.skip_scale.clone() for block in blocks}
    first = {block.first.neuron: block for block in blocks}
    inside = {*first, *(block.neuron for block in blocks)} if stem_only else set()
    training = {m: m.training for m in snn.modules()}
    snn.eval()
    done = False
    try:
        with torch.no_grad():
            nodes = _nodes_in_order(snn, encoder.steps(images[:1], 1))
            for node in nodes.values():
                node.leak = 1.0
            bar = progress_bar(nodes.items(), quiet=not progress, desc="balancing thresholds", unit="layer")
            for name, node in bar:
                peak = 1.0 if node in inside else _largest_input(snn, node, images, encoder, chunk, reduce)
                if not (math.isfinite(peak) and peak > 0):
                    raise ValueError(
                        f"neuron '{name}': its largest weighted input in {encoder.T} steps is {peak}, so no "
                        f"threshold can be set; use an encoder with more steps (deep layers start late), "
                        f"and a trained network"
                    )
                node.v_threshold = peak
                if node in first:
                    first[node].skip_scale.fill_(1.0 / peak)
            for node in nodes.values():
                node.v_threshold *= scale
            for node, block in first.items():
                block.skip_scale.fill_(1.0 / node.v_threshold)
        done = True
    finally:
        for node, (v_threshold, leak) in before.items():
            node.leak = leak
            if not done:
                node.v_threshold = v_threshold
        if not done:
            for block, value in scales.items():
                block.skip_scale.copy_(value)
        for module, mode in training.items():
            module.training = mode
        functional.reset_net(snn)
    return {name: node.v_threshold for name, node in nodes.items()}


def _reduction(statistic: str | float) -> Callable[[Tensor], float]:
    """Return the function that takes the maximum of ``[steps, N, ...]``, or of its steps' percentiles."""
    if statistic == "max":
        return lambda x: x.amax().item()

    def percentile(x: Tensor) -> float:
        steps = x[:1] if x.stride(0) == 0 else x
        size = steps[0].numel()
        k = min(size, max(1, math.ceil(statistic / 100 * size)))
        return max(step.flatten().kthvalue(k).values.item() for step in steps)

    return percentile


def _nodes_in_order(snn: nn.Module, x: Tensor) -> dict[str, TimeLoopNode]:
    """Return this package's neurons by name, in the order in which they run."""
    order: dict[str, TimeLoopNode] = {}

    def watch(name: str):
        def hook(module, args, output):
            if name in order:
                raise ValueError(
                    f"neuron '{name}' runs more than once in a forward pass; use one module for each"
                )
            order[name] = module

        return hook

    found = {name: m for name, m in snn.named_modules() if isinstance(m, TimeLoopNode)}
    for name, node in found.items():
        if node.step_mode != "m":
            raise ValueError(f"neuron '{name}' is in step mode '{node.step_mode}', balancing needs 'm'")
    hooks = [node.register_forward_hook(watch(name)) for name, node in found.items()]
    functional.reset_net(snn)
    try:
        snn(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not order:
        raise ValueError(f"{type(snn).__name__} runs no neuron of lasnn_sj.neurons; convert the ANN first")
    return order


def _largest_input(
    snn: nn.Module,
    node: TimeLoopNode,
    images: Tensor,
    encoder: nn.Module,
    chunk: int,
    reduce: Callable[[Tensor], float],
) -> float:
    """Return the largest weighted input of one neuron over the batch and all steps."""
    peak = -math.inf

    def watch(module, args):
        nonlocal peak
        peak = max(peak, reduce(args[0]))
        raise _Stop

    functional.reset_net(snn)
    with node.register_forward_pre_hook(watch):
        left = encoder.T
        while left:
            steps = min(chunk, left)
            try:
                snn(encoder.steps(images, steps))
            except _Stop:
                pass
            left -= steps
    return peak


@torch.no_grad()
def scale_output(
    snn: nn.Module, images: Tensor, labels: Tensor, encoder: nn.Module, batch: int = 64, chunk: int = 4
) -> float:
    """Multiply the output layer's weights by the factor that gives the least cross-entropy.

    A converted network's output is a sum over ``T`` steps, so that its cross-entropy may be far above that of
    guessing although its decisions are right. One positive factor changes no decision.

    Args:
        snn: a network whose last linear layer or convolution gives the scores, as :func:`convert` makes it.
            Modes are restored and states reset afterwards.
        images: calibration images ``[N, C, H, W]`` as the encoder takes them.
        labels: ``[N]``, whole numbers.
        encoder: adds the time axis.
        batch: images held in memory at once.
        chunk: time steps held in memory at once.

    Returns:
        The factor, one of 40 from 1e-3 to 1 in equal ratios.

    Raises:
        ValueError: the network has no such layer, or neurons behind it.
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd, TimeLoopNode)
    layers = [m for m in snn.modules() if isinstance(m, kinds)]
    if not layers or isinstance(layers[-1], TimeLoopNode):
        raise ValueError(f"{type(snn).__name__} does not end in a linear layer or convolution to scale")
    training = {m: m.training for m in snn.modules()}
    snn.eval()
    try:
        pieces = images.split(batch)
        scores = torch.cat([_scores(snn, piece, encoder, chunk) for piece in pieces])
        factors = torch.logspace(-3, 0, 40).tolist()
        best = min(factors, key=lambda c: F.cross_entropy(c * scores, labels).item())
        parameters = [p for p in (layers[-1].weight, layers[-1].bias) if p is not None]
        for parameter in parameters:
            parameter.mul_(best)
    finally:
        for module, mode in training.items():
            module.training = mode
        functional.reset_net(snn)
    return best


def _scores(snn: nn.Module, images: Tensor, encoder: nn.Module, chunk: int) -> Tensor:
    """Compute class scores ``[N, K]``, with time in chunks."""
    readout, total, left = resolve_readout(snn, "auto"), torch.zeros(()), encoder.T
    functional.reset_net(snn)
    while left:
        steps = min(chunk, left)
        scores = class_scores(snn(encoder.steps(images, steps)), len(images), readout)
        total, left = total.to(scores) + steps * scores, left - steps
    return scores if readout == "last" else total / encoder.T
