"""ANN to SNN: the same weights, thresholds balanced in the spiking domain (LaSNN, Section III-D)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from spikingjelly.activation_based import base, functional, layer
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.layers import Conv2d
from ..models.resnet import Block
from ..neurons import IntegratorNode, LIFNode, TimeLoopNode

_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_MAX_POOLS = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd, nn.FractionalMaxPool2d)


class ConversionError(ValueError):
    """The network cannot be converted; the message names the layer and what would do instead."""


def convert(ann: nn.Module, leak: float = 0.99) -> nn.Module:
    """An SNN with the ANN's structure and weights.

    Every ``nn.ReLU`` becomes a :class:`~lasnn_sj.neurons.LIFNode` with threshold 1, which
    :func:`balance_thresholds` then sets; the output integrates (Eq. 3). Works for the networks of
    :mod:`lasnn_sj.models` and for any other that is built of modules, one ReLU module for each use.

    Args:
        ann: a network of bias-free convolutions and linear layers, ReLU, average pooling, dropout.
        leak: leak of the neurons; 1 for pure conversion.

    Returns:
        A new network in evaluation or training mode as the ANN was, ``[T, N, ...]`` to ``[T, N, K]``. A
        network that has no ``readout`` of its own is wrapped as ``nn.Sequential(network, integrator)``.

    Raises:
        ConversionError: a bias, batch norm, max pooling, another nonlinearity, a ReLU module in two places,
            a layer without multi-step form, or no ReLU at all.
    """
    check_convertible(ann)
    body = copy.deepcopy(ann)
    forms: dict[nn.Module, nn.Module | None] = {}
    for name, module in list(body.named_modules(remove_duplicate=False)):
        if module not in forms:  # a pool that stands in two places stays one module
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
    snn.train(ann.training)
    functional.invalidate_reset_cache(snn)
    return snn


def check_convertible(ann: nn.Module, normalised: bool = False) -> None:
    """Raise :class:`ConversionError` where a network holds what spiking neurons cannot do.

    Args:
        ann: the network.
        normalised: allow batch norm and biases, and layers without multi-step form.
    """
    relus: dict[nn.Module, str] = {}
    for name, module in ann.named_modules(remove_duplicate=False):
        where = f"layer '{name}' ({type(module).__name__})"
        if isinstance(module, _MAX_POOLS):
            raise ConversionError(
                f"{where} takes a maximum, which loses information on spikes: use average pooling "
                f"(nn.AvgPool2d) and train the ANN with it"
            )
        if isinstance(module, nn.ReLU):
            if module in relus:
                raise ConversionError(
                    f"{where} is the same module as layer '{relus[module]}': a neuron keeps the state of one "
                    f"layer, so give each place an nn.ReLU of its own"
                )
            relus[module] = name
        elif type(module).__module__ == "torch.nn.modules.activation":
            raise ConversionError(f"{where} cannot be a spiking neuron: train the ANN with nn.ReLU")
        elif isinstance(module, base.MemoryModule) and not isinstance(module, layer.Dropout):
            raise ConversionError(f"{where} is a spiking layer already: convert takes an ANN")
        elif not normalised:
            _check_plain(module, where)
    if not relus:
        raise ConversionError(
            f"{type(ann).__name__} has no nn.ReLU module to turn into neurons; a functional F.relu cannot "
            f"be seen, use one nn.ReLU module for each use"
        )


def _check_plain(module: nn.Module, where: str) -> None:
    """What threshold balancing cannot do besides."""
    if isinstance(module, _NORMS):
        raise ConversionError(
            f"{where} normalises, which a spiking layer without bias cannot do: train the "
            f"intermediate ANN without normalisation (see lasnn_sj.models)"
        )
    if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return
    if module.bias is not None:
        raise ConversionError(
            f"{where} has a bias, which threshold balancing cannot scale: train the ANN with bias=False"
        )
    if not (type(module) in (nn.Conv2d, nn.Linear) or isinstance(module, base.StepModule)):
        raise ConversionError(f"{where} has no multi-step form: use nn.Conv2d and nn.Linear themselves")


def _spiking_form(module: nn.Module, leak: float) -> nn.Module | None:
    """SpikingJelly's multi-step form of a stock layer; ``None`` where it stays as it is."""
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
    """Ends a forward pass at the neuron whose input was wanted."""


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
    """Set every neuron's threshold by balancing in the spiking domain (LaSNN, Section III-D).

    Layer by layer, earlier thresholds already set: ``v_threshold`` of layer ``l`` = maximum, over the
    batch and ``encoder.T`` steps, of the layer's weighted input per step, with leak 1 while balancing.
    Time streams through in pieces, so memory does not grow with ``T``. Dropout is off meanwhile; modes,
    leaks and states are restored (states reset) afterwards.

    Args:
        snn: a network of this package's neurons in multi-step mode, as :func:`convert` gives it.
        images: one batch ``[N, C, H, W]`` as the encoder takes it; the paper's is 512 images.
        encoder: its ``T`` is the number of steps; the paper's is 2500.
        statistic: ``"max"``, or a percentile in (0, 100]: the largest over the steps of that percentile
            of a step's inputs.
        scale: factor of all thresholds in the end; Rathi et al. take 0.7 for the training afterwards.
        stem_only: in a residual network balance only the neurons outside its blocks and leave those
            inside at 1 (before ``scale``), as Rathi et al. do.
        chunk: time steps held in memory at once.
        progress: show a progress bar.

    Returns:
        The thresholds by module name, in the order of the layers.

    Raises:
        ValueError: a statistic, scale or chunk out of range, no neuron, a neuron that runs twice, or a
            layer whose input is never above 0 (thresholds are then left as they were).
    """
    if statistic != "max" and not (isinstance(statistic, (int, float)) and 0 < statistic <= 100):
        raise ValueError(f'statistic must be "max" or a percentile in (0, 100], got {statistic!r}')
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 time step, got {chunk}")
    if images.dim() < 2 or len(images) < 1:
        raise ValueError(f"images must be a batch [N, ...] of at least one, got shape {tuple(images.shape)}")
    reduce = _reduction(statistic)
    before = {m: (m.v_threshold, m.leak) for m in snn.modules() if isinstance(m, TimeLoopNode)}
    scales = {m: m.skip_scale.clone() for m in snn.modules() if isinstance(m, Block)}
    training = {m: m.training for m in snn.modules()}
    snn.eval()
    done = False
    try:
        with torch.no_grad():
            nodes = _nodes_in_order(snn, encoder.steps(images[:1], 1))
            inside = {
                f"{name}.{child}": block
                for name, block in snn.named_modules()
                if isinstance(block, Block)
                for child in ("first.neuron", "neuron")
            }
            for node in nodes.values():
                node.leak = 1.0
            bar = tqdm(nodes.items(), desc="balancing thresholds", unit="layer", disable=not progress)
            for name, node in bar:
                if stem_only and name in inside:
                    node.v_threshold = 1.0
                    inside[name].skip_scale.fill_(1.0)
                    continue
                peak = _largest_input(snn, node, images, encoder, chunk, reduce)
                if not (math.isfinite(peak) and peak > 0):
                    raise ValueError(
                        f"neuron '{name}': its largest weighted input in {encoder.T} steps is {peak}, so no "
                        f"threshold can be set; give the encoder more steps (a deep layer starts late), "
                        f"or is the network not trained?"
                    )
                node.v_threshold = peak
                if name in inside and name.endswith("first.neuron"):
                    inside[name].skip_scale.fill_(1.0 / peak)
            for node in nodes.values():
                node.v_threshold *= scale
            for name, block in inside.items():
                if name.endswith("first.neuron"):
                    block.skip_scale.fill_(1.0 / block.first.neuron.v_threshold)
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
    """Largest value of a piece ``[steps, N, ...]``, or largest of its steps' percentiles."""
    if statistic == "max":
        return lambda x: x.amax().item()

    def percentile(x: Tensor) -> float:
        steps = x[:1] if x.stride(0) == 0 else x
        size = steps[0].numel()
        k = min(size, max(1, math.ceil(statistic / 100 * size)))
        return max(step.flatten().kthvalue(k).values.item() for step in steps)

    return percentile


def _nodes_in_order(snn: nn.Module, x: Tensor) -> dict[str, TimeLoopNode]:
    """This package's neurons by name, in the order in which they run."""
    order: dict[str, TimeLoopNode] = {}

    def watch(name: str):
        def hook(module, args, output):
            if name in order:
                raise ValueError(
                    f"neuron '{name}' runs more than once in a forward pass; give each use its own module"
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
        raise ValueError(
            f"{type(snn).__name__} has no neuron of lasnn_sj.neurons that runs; convert the ANN first"
        )
    return order


def _largest_input(
    snn: nn.Module,
    node: TimeLoopNode,
    images: Tensor,
    encoder: nn.Module,
    chunk: int,
    reduce: Callable[[Tensor], float],
) -> float:
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
