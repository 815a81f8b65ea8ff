"""Export of trained students to NIR, for other simulators and neuromorphic hardware.

Needs ``nir`` and ``nirtorch``. The graph describes one time step: its input is one step of the encoded
sample ``[C, H, W]`` (with direct encoding, the same image in every step), its output the class scores of that
step. SpikingJelly's ``nir_exchange`` writes it. Layers that it does not support are first rewritten:

- NIR's neurons fire above their threshold, SpikingJelly's at it: ``v >= v_threshold`` is written as
  ``v >`` the next smaller float32.
- Potentials are written relative to ``v_reset``, so that they start at 0 and are reset to 0, as every
  simulator assumes.
- Batch norm is folded into the convolution or linear layer before it. Where there is none (behind a sum),
  it becomes a 1x1 convolution; results then differ by rounding. Dropout is removed. Global average pooling
  becomes average pooling.
- An :class:`~lasnn_sj.neurons.IntegratorNode` at the output is removed: its potential is the sum of the
  outputs over time.

SpikingJelly reads all of it back. snnTorch 1.0 reads LIF neurons (with the ``dt`` of :data:`DT`) but not IF
neurons. Norse 1.1 reads IF neurons and LIF neurons with ``decay_input=True``, but no average pooling. Both
take one sample at a time, because NIR's flattening has no batch dimension.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from spikingjelly.activation_based import base, functional, layer, neuron
from torch import fx, nn
from torch.nn.utils import fusion, prune

from ..models import layers
from ..models.readout import resolve_readout
from ..neurons import Conv2d, IntegratorNode, Linear, Sequential
from ..neurons.accelerate import AcceleratedIFNode, AcceleratedLIFNode

if TYPE_CHECKING:
    import nir

DT = 1e-4  # seconds; other simulators, such as snnTorch, read NIR with this time step
_CONV2D = (nn.Conv2d, layer.Conv2d, Conv2d, layers.Conv2d)
_LINEAR = (nn.Linear, layer.Linear, Linear)
_NORM2D = (nn.BatchNorm2d, layer.BatchNorm2d, layers.BatchNorm2d)
_NORM1D = (nn.BatchNorm1d, layer.BatchNorm1d)
_AVERAGE = (nn.AvgPool2d, layer.AvgPool2d)
_ADAPTIVE = (nn.AdaptiveAvgPool2d, layer.AdaptiveAvgPool2d)
_FLATTEN = (nn.Flatten, layer.Flatten)
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d, layer.Dropout, layer.Dropout2d)
_MAXIMUM = (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
# Containers that only run their layers in order, whatever else their forward does about it.
_IN_ORDER = (layer.SeqToANNContainer, layer.MultiStepContainer, Sequential)
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_FLAT = (torch.flatten, "flatten")


class ExportError(ValueError):
    """The network cannot be exported to NIR; the message names the layers and a remedy."""


def to_nir(student: nn.Module, sample_shape: Sequence[int], dt: float = DT) -> nir.NIRGraph:
    """Convert a student to a NIR graph that emits the same spikes.

    Args:
        student: network of convolutions, linear layers, batch norm, average pooling and SpikingJelly's
            ``IFNode``, ``LIFNode`` or ``ParametricLIFNode`` with hard reset (accelerated or not), in either
            step mode. The graph is that of evaluation mode, without dropout; the student is not changed.
        sample_shape: shape of one sample at one step, ``(C, H, W)``, without time and batch.
        dt: duration of a time step in seconds, the unit of NIR's time constants.

    Returns:
        The graph. ``readout`` in its output node's metadata is ``"mean"`` or ``"sum"``: the class scores are
        the mean or the sum of the outputs over time.

    Raises:
        ImportError: nir or nirtorch is not installed.
        ExportError: layers that NIR cannot express; all are named.
        ValueError: a sample shape that does not fit the network, or ``dt`` not above 0.
    """
    try:
        from spikingjelly.activation_based import nir_exchange
    except ImportError as error:
        raise ImportError("NIR export needs nir and nirtorch: pip install 'lasnn-sj[nir]'") from error
    if not dt > 0:
        raise ValueError(f"dt must be above 0 seconds, got {dt!r}")
    _refuse(student)
    example = torch.zeros(1, *sample_shape)
    graph = nir_exchange.export_to_nir(_rebuild(student, example), example, dt=dt)
    for node in graph.nodes.values():
        if hasattr(node, "v_threshold"):
            node.v_threshold = np.nextafter(node.v_threshold.astype(np.float32), np.float32(-np.inf))
    readout = "sum" if resolve_readout(student, "auto") == "last" else "mean"
    graph.nodes["output"].metadata["readout"] = readout
    return graph


def save(student: nn.Module, path: str | Path, sample_shape: Sequence[int], dt: float = DT) -> Path:
    """Write the graph of :func:`to_nir` to a file, atomically.

    Args:
        student, sample_shape, dt: as for :func:`to_nir`, which raises the same errors.
        path: the file; missing folders are created.

    Returns:
        The path.
    """
    graph = to_nir(student, sample_shape, dt)
    import nir

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    nir.write(part, graph)
    part.replace(path)
    return path


def _refuse(student: nn.Module) -> None:
    """Raise one error for all layers that have no form in NIR in any context."""
    reasons: dict[str, list[str]] = {}
    for name, module in student.named_modules():
        if reason := _why_not(module):
            reasons.setdefault(reason, []).append(name or "(root)")
    listed = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if listed:
        raise ExportError(f"{type(student).__name__} cannot be exported to NIR:\n  " + "\n  ".join(listed))


def _why_not(module: nn.Module) -> str | None:
    kind = type(module).__name__
    stock = "train with SpikingJelly's IFNode or LIFNode and v_reset=0.0 (neurons.accelerate makes them fast)"
    if isinstance(module, (neuron.BaseNode, neuron.SimpleBaseNode)):
        if getattr(module, "v_reset", None) is None:
            return f"{kind} resets by subtracting its threshold, which NIR does not have; {stock}"
        known = (neuron.IFNode, neuron.LIFNode, AcceleratedIFNode, AcceleratedLIFNode)
        if type(module) not in (*known, neuron.ParametricLIFNode):
            return f"NIR has no equivalent of {kind}; {stock}"
    elif isinstance(module, _MAXIMUM):
        return f"NIR has no max pooling ({kind}); train with average pooling or strided convolutions"
    elif type(module) in _CONV2D and (module.groups != 1 or module.padding_mode != "zeros"):
        return (
            f"groups={module.groups} and padding_mode={module.padding_mode!r}; SpikingJelly exports only "
            f"groups=1 and padding_mode='zeros'"
        )
    elif type(module) in _AVERAGE and (
        module.ceil_mode
        or module.divisor_override is not None
        or (max(_pair(module.padding)) and not module.count_include_pad)
    ):
        return "NIR's average pooling has no ceil_mode, divisor_override or count_include_pad=False"
    elif type(module) in (*_NORM2D, *_NORM1D) and module.running_var is None:
        return f"{kind} has no running statistics; train with track_running_stats=True"
    return None


class _Tracer(fx.Tracer):
    """Trace every layer as one call, and the layers of containers one after the other."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Sequential):  # also an empty one
            return False
        return isinstance(m, (base.MemoryModule, neuron.SimpleBaseNode)) or not any(m.children())

    def call_module(self, m: nn.Module, forward, args, kwargs):
        if isinstance(m, _IN_ORDER):
            (x,) = args
            for child in m:
                x = child(x)
            return x
        return super().call_module(m, forward, args, kwargs)


def _trace(student: nn.Module) -> fx.Graph:
    training = {module: module.training for module in student.modules()}
    student.eval()
    try:
        # wrapped, so that a student that is a single layer is a call, too
        return _Tracer().trace(nn.Sequential(student))
    except (fx.proxy.TraceError, TypeError) as error:
        raise ExportError(
            f"{type(student).__name__}'s forward cannot be traced ({error}); NIR needs one of modules and "
            f"sums, without branches on its input"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode


@torch.no_grad()
def _rebuild(student: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    """Return one step of the student, of stock single-step layers on the CPU in float32."""
    graph = _trace(student)
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    rebuilt: dict[str, nn.Module] = {}
    originals = nn.Sequential(student)
    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method"):
            _rewrite_call(node, rebuilt)
            continue
        if node.op != "call_module":
            continue
        name, module = node.target.removeprefix("0").removeprefix("."), originals.get_submodule(node.target)
        if isinstance(module, neuron.BaseNode) and calls[node.target] > 1:
            raise ExportError(
                f"layer '{name}': one {type(module).__name__} is used in {calls[node.target]} places, which "
                f"would share its potential; use one neuron for each"
            )
        last = all(user.op == "output" for user in node.users)
        if type(module) in _NOTHING or (isinstance(module, IntegratorNode) and last):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif type(module) in (*_NORM2D, *_NORM1D):
            _fold(node, module, rebuilt)
        else:
            node.target = _add(rebuilt, node, _stock(module, name))
    return _fixed_pools(fx.GraphModule(rebuilt, graph), example)


def _add(rebuilt: dict[str, nn.Module], node: fx.Node, module: nn.Module) -> str:
    """Store a node's module under its name without the wrapper's leading number; return that name."""
    name = node.name.removeprefix("_0_")
    while name in rebuilt:
        name += "_"
    rebuilt[name] = module
    return name


def _rewrite_call(node: fx.Node, rebuilt: dict[str, nn.Module]) -> None:
    """Rewrite sums as ``operator.add`` and flattening as a layer; raise for any other function."""
    both = len(node.args) == 2 and all(isinstance(arg, fx.Node) for arg in node.args)
    if node.target in _ADD and both and not node.kwargs and node.args[0] is not node.args[1]:
        node.op, node.target = "call_function", operator.add
        return
    dims = (*node.args[1:], *node.kwargs.values())
    if node.target in _FLAT and dims in ((1,), (2,), (1, -1), (2, -1)):  # without or with time in front
        node.op, node.args, node.kwargs = "call_module", node.args[:1], {}
        node.target = _add(rebuilt, node, nn.Flatten())
        return
    inside = list(node.meta.get("nn_module_stack", {}))
    where = (inside[-1] if inside else "0").removeprefix("0").removeprefix(".") or "(root)"
    called = node.target if isinstance(node.target, str) else node.target.__name__
    raise ExportError(
        f"layer '{where}': its forward calls {called}{tuple(node.args[1:])}, which has no form in NIR; only "
        f"the sum of two layers and flatten(1) have one, so use layers for the rest (and take a mean over "
        f"time outside the network)"
    )


def _fold(node: fx.Node, norm: nn.Module, rebuilt: dict[str, nn.Module]) -> None:
    """Fold batch norm into the layer before it if only batch norm uses that, else make it a layer."""
    before = node.args[0]
    host = rebuilt.get(before.target) if before.op == "call_module" and len(before.users) == 1 else None
    flat = type(norm) in _NORM1D
    if isinstance(host, nn.Linear if flat else nn.Conv2d):
        node.replace_all_uses_with(before)
        node.graph.erase_node(node)
    else:
        channels = norm.num_features
        host = nn.Linear(channels, channels) if flat else nn.Conv2d(channels, channels, 1)
        host.weight.copy_(torch.eye(channels).view_as(host.weight))
        host.bias.zero_()
        node.target = _add(rebuilt, node, host)
    parts = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, variance, gain, shift = (None if part is None else part.detach().float().cpu() for part in parts)
    fuse = fusion.fuse_linear_bn_weights if flat else fusion.fuse_conv_bn_weights
    host.weight, host.bias = fuse(host.weight, host.bias, mean, variance, norm.eps, gain, shift)


def _stock(module: nn.Module, name: str) -> nn.Module:
    """Return the equivalent single-step layer that SpikingJelly can export."""
    if type(module) in _CONV2D:
        return _weighted(module, nn.Conv2d(
            module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
            module.dilation, bias=module.bias is not None,
        ))  # fmt: skip
    if type(module) in _LINEAR:
        return _weighted(
            module, nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        )
    if type(module) in _AVERAGE:
        return nn.AvgPool2d(*(_pair(value) for value in (module.kernel_size, module.stride, module.padding)))
    if type(module) in _ADAPTIVE:
        return nn.AdaptiveAvgPool2d(module.output_size)
    if type(module) in _FLATTEN and (module.start_dim, module.end_dim) == (1, -1):
        return nn.Flatten()
    if isinstance(module, neuron.BaseNode):
        return _stock_neuron(module)
    advice = "it is allowed at the output only" if isinstance(module, IntegratorNode) else (
        "use SpikingJelly's Conv2d, Linear, BatchNorm, AvgPool2d, Flatten, and neurons"
    )  # fmt: skip
    raise ExportError(f"layer '{name}': {type(module).__name__} has no form in NIR; {advice}")


def _weighted(module: nn.Module, stock: nn.Module) -> nn.Module:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            hook(module, ())  # a masked layer's weight dates from its last forward pass
    stock.weight.copy_(module.weight.detach())
    if module.bias is not None:
        stock.bias.copy_(module.bias.detach())
    return stock


def _stock_neuron(node: neuron.BaseNode) -> neuron.BaseNode:
    threshold = node.v_threshold - node.v_reset
    if isinstance(node, neuron.IFNode):
        return neuron.IFNode(threshold, v_reset=0.0)
    tau = node.tau if isinstance(node, neuron.LIFNode) else 1 / node.w.sigmoid().item()
    return neuron.LIFNode(tau, node.decay_input, threshold, v_reset=0.0)


def _fixed_pools(net: fx.GraphModule, example: torch.Tensor) -> fx.GraphModule:
    """Replace adaptive pools by pools of a fixed size, from the shapes of the example's feature maps."""
    shapes: dict[str, torch.Size] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: shapes.update({name: args[0].shape}))
        for name, module in net.named_children()
        if isinstance(module, nn.AdaptiveAvgPool2d)
    ]
    try:
        net(example)
    except RuntimeError as error:
        raise ValueError(
            f"sample_shape {tuple(example.shape[1:])} does not fit the network: {error}"
        ) from error
    finally:
        functional.reset_net(net)
        for handle in handles:
            handle.remove()
    for name, shape in shapes.items():
        inside = shape[-2:]
        outside = [n or m for n, m in zip(_pair(getattr(net, name).output_size), inside)]
        if any(m % n for m, n in zip(inside, outside)):
            raise ExportError(
                f"layer '{name}': {tuple(inside)} pixels cannot be divided evenly into {tuple(outside)}, as "
                f"NIR's pooling does; use images of another size or AvgPool2d"
            )
        setattr(net, name, nn.AvgPool2d(tuple(m // n for m, n in zip(inside, outside))))
    return net


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) or value is None else tuple(value)
