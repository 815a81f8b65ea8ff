"""Magnitude pruning of convolutions, on ``torch.nn.utils.prune`` (reverse-KD, Eq. 3).

A pruned convolution keeps ``weight_orig`` and ``weight_mask`` instead of ``weight`` and multiplies them in
every forward, so a masked connection stays exactly 0 whatever the optimiser does. Both are in
``state_dict``; to load such a state into a fresh network give it masks first: ``prune_magnitude(net, 0.0)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prune_magnitude(
    model: nn.Module, ratio: float, scope: Literal["global", "layer"] = "global"
) -> nn.Module:
    """Mask the convolutions' connections of smallest ``|w|``, in place (``W_pruned = W * M``, Eq. 3).

    Args:
        model: any network; only weights of convolutions are pruned, 1x1 shortcuts among them, no biases.
        ratio: fraction of connections to mask, in [0, 1); of ``n`` connections ``round(ratio * n)``
            are masked, to the one. 0 masks none, but attaches masks.
        scope: ``"global"`` ranks all convolutions' connections together, ``"layer"`` each layer's.

    Returns:
        The same ``model``. Optimisers made before stay valid.

    Raises:
        ValueError: a ratio outside [0, 1), another scope, no convolution, or masks there already.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 <= ratio < 1:
        raise ValueError(f"ratio must lie in [0, 1), the fraction of connections to prune; got {ratio!r}")
    if scope not in ("global", "layer"):
        raise ValueError(f'scope must be "global" or "layer", got {scope!r}')
    layers = _convolutions(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no convolution to prune")
    masked = [name for name, module in layers.items() if _is_masked(module)]
    if masked:
        raise ValueError(
            f"{masked[0]} has a pruning mask already; call make_permanent(model) first, the weights that "
            f"are 0 then count among the smallest"
        )
    modules = list(layers.values())
    for group in [modules] if scope == "global" else [[module] for module in modules]:
        _mask_smallest(group, ratio)
    for module in modules:
        module.weight = module.weight.detach()  # made anew in every forward; with a graph deepcopy would fail
    return model


def _mask_smallest(modules: list[nn.Module], ratio: float) -> None:
    # prune.global_unstructured would do, but raises on weights in channels_last
    magnitudes = torch.cat([module.weight.detach().abs().flatten() for module in modules])
    smallest = magnitudes.topk(round(ratio * len(magnitudes)), largest=False).indices
    masks = torch.ones_like(magnitudes).index_fill_(0, smallest, 0.0)
    for module, mask in zip(modules, masks.split([module.weight.numel() for module in modules])):
        prune.custom_from_mask(module, "weight", mask.view(module.weight.shape))


def make_permanent(model: nn.Module) -> nn.Module:
    """Write the zeros into the weights and take the masks off, in place; does nothing without masks."""
    for module in _convolutions(model).values():
        if _is_masked(module):
            prune.remove(module, "weight")
    return model


@dataclass(frozen=True)
class Sparsity:
    """How many of a network's convolutional connections are exactly 0.

    Attributes:
        layers: ``(zeros, connections)`` for each convolution, by module name.
    """

    layers: dict[str, tuple[int, int]]

    @property
    def zeros(self) -> int:
        """Connections that are 0, in all."""
        return sum(zeros for zeros, _ in self.layers.values())

    @property
    def connections(self) -> int:
        """Connections in all."""
        return sum(connections for _, connections in self.layers.values())

    @property
    def total(self) -> float:
        """Fraction of all connections that are 0."""
        return self.zeros / self.connections if self.connections else 0.0

    def fraction(self, layer: str) -> float:
        """Fraction of one layer's connections that are 0."""
        zeros, connections = self.layers[layer]
        return zeros / connections

    def __str__(self) -> str:
        rows = [(name, *counts) for name, counts in self.layers.items()]
        rows.append(("all", self.zeros, self.connections))
        width = max(len(name) for name, _, _ in rows)
        return "\n".join(
            f"{name:<{width}}  {100 * zeros / max(count, 1):6.2f} %  {zeros} of {count}"
            for name, zeros, count in rows
        )


def sparsity(model: nn.Module) -> Sparsity:
    """Zeros among the convolutions' connections, masked or permanent, per layer and in all."""
    counts = {}
    for name, module in _convolutions(model).items():
        weight = _effective_weight(module)
        counts[name] = (int((weight == 0).sum()), weight.numel())
    return Sparsity(counts)


@torch.no_grad()
def _effective_weight(module: nn.Module) -> Tensor:
    # the attribute `weight` of a masked layer is as old as its last forward
    return module.weight_orig * module.weight_mask if _is_masked(module) else module.weight


def _is_masked(module: nn.Module) -> bool:
    return hasattr(module, "weight_mask")


def _convolutions(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)}
