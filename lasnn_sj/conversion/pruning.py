"""Magnitude pruning of convolutions with ``torch.nn.utils.prune`` (reverse distillation, Eq. 3).

A pruned convolution has ``weight_orig`` and ``weight_mask`` in place of ``weight`` and multiplies them in
every forward pass, so a masked connection stays exactly 0 under any optimizer. Both are in ``state_dict``. To
load such a state into a fresh network, attach masks first: ``prune_magnitude(net, 0.0)``.
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
    """Mask the convolutions' connections with the smallest ``|w|``, in place (``W_pruned = W * M``, Eq. 3).

    Args:
        model: any network. Only weights of convolutions are pruned, including 1x1 shortcuts; biases are not.
        ratio: fraction of connections to mask, in [0, 1): exactly ``round(ratio * n)`` of ``n`` connections
            are masked. A ratio of 0 attaches masks without masking anything.
        scope: ``"global"`` ranks the connections of all convolutions together, ``"layer"`` each layer's.

    Returns:
        The same ``model``. Existing optimizers stay valid.

    Raises:
        ValueError: a ratio outside [0, 1), another scope, no convolution, or existing masks.
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
            f"{masked[0]} already has a pruning mask; call make_permanent(model) first, so that weights of 0 "
            f"count among the smallest"
        )
    modules = list(layers.values())
    for group in [modules] if scope == "global" else [[module] for module in modules]:
        _mask_smallest(group, ratio)
    for module in modules:
        module.weight = (
            module.weight.detach()
        )  # recomputed in every forward; deepcopy fails on tensors with a graph
    return model


def _mask_smallest(modules: list[nn.Module], ratio: float) -> None:
    # prune.global_unstructured raises on weights in channels_last
    magnitudes = torch.cat([module.weight.detach().abs().flatten() for module in modules])
    smallest = magnitudes.topk(round(ratio * len(magnitudes)), largest=False).indices
    masks = torch.ones_like(magnitudes).index_fill_(0, smallest, 0.0)
    for module, mask in zip(modules, masks.split([module.weight.numel() for module in modules])):
        prune.custom_from_mask(module, "weight", mask.view(module.weight.shape))


def make_permanent(model: nn.Module) -> nn.Module:
    """Write the zeros into the weights and remove the masks, in place; do nothing without masks."""
    for module in _convolutions(model).values():
        if _is_masked(module):
            prune.remove(module, "weight")
    return model


@dataclass(frozen=True)
class Sparsity:
    """Counts of a network's convolutional connections that are exactly 0.

    Attributes:
        layers: ``(zeros, connections)`` of each convolution by module name.
    """

    layers: dict[str, tuple[int, int]]

    @property
    def zeros(self) -> int:
        """Total number of connections that are 0."""
        return sum(zeros for zeros, _ in self.layers.values())

    @property
    def connections(self) -> int:
        """Total number of connections."""
        return sum(connections for _, connections in self.layers.values())

    @property
    def total(self) -> float:
        """Fraction of all connections that are 0."""
        return self.zeros / self.connections if self.connections else 0.0

    def fraction(self, layer: str) -> float:
        """Return the fraction of one layer's connections that are 0."""
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
    """Count the zeros among the convolutions' connections, masked or permanent, per layer and in total."""
    counts = {}
    for name, module in _convolutions(model).items():
        weight = _effective_weight(module)
        counts[name] = (int((weight == 0).sum()), weight.numel())
    return Sparsity(counts)


@torch.no_grad()
def _effective_weight(module: nn.Module) -> Tensor:
    # the attribute `weight` of a masked layer dates from its last forward pass
    return module.weight_orig * module.weight_mask if _is_masked(module) else module.weight


def _is_masked(module: nn.Module) -> bool:
    return hasattr(module, "weight_mask")


def _convolutions(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, _CONVOLUTIONS)}
