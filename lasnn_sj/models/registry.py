"""Models by name."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import nn

P = ParamSpec("P")
Net = TypeVar("Net", bound=nn.Module)
_BUILDERS: dict[str, Callable[..., nn.Module]] = {}


def builder(build: Callable[P, Net]) -> Callable[P, Net]:
    """Decorate a function that builds a network, so that :func:`create` finds it by its name.

    The networks it builds remember what built them: ``net.architecture`` is
    ``{"name": ..., "arguments": {...}}``, which :func:`~lasnn_sj.models.save_pretrained` writes.
    """
    signature = inspect.signature(build)

    @functools.wraps(build)
    def recorded(*args: P.args, **kwargs: P.kwargs) -> Net:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name in ("num_classes", "in_channels"):
            count = bound.arguments.get(name, 1)
            if not isinstance(count, numbers.Integral) or count < 1:
                raise ValueError(
                    f"{build.__name__}: {name} must be a whole number, at least 1; got {count!r}"
                )
        net = build(*args, **kwargs)
        net.architecture = {"name": build.__name__, "arguments": dict(bound.arguments)}
        return net

    _BUILDERS[build.__name__] = recorded
    return recorded


def student_builder(
    name: str, network: type[nn.Module], *structure: Any, doc: str
) -> Callable[..., nn.Module]:
    """Return the builder of one of LaSNN's students, which all take the same arguments.

    Args:
        name: name of the builder.
        network: class that is built.
        structure: the class's first arguments.
        doc: first lines of the builder's docstring.
    """

    def build(
        num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0,
        spiking: bool = True, leak: float = 0.99, dropout: float = 0.2,
    ) -> nn.Module:  # fmt: skip
        return network(*structure, num_classes, in_channels, image_size, width, spiking, leak, dropout)

    build.__name__ = build.__qualname__ = name
    build.__module__ = network.__module__
    build.__doc__ = f"{doc} For the arguments see :class:`{network.__name__}`."
    return builder(build)


def list_models(pattern: str = "*") -> list[str]:
    """List the names that :func:`create` knows, in alphabetical order.

    Args:
        pattern: shell pattern that the names match, for example ``"vgg*"`` or ``"teacher_*"``.
    """
    return sorted(fnmatch.filter(_BUILDERS, pattern))


def create(name: str, **arguments: Any) -> nn.Module:
    """Build a model by its name, as the function of that name in :mod:`lasnn_sj.models` does.

    Args:
        name: one of :func:`list_models`.
        arguments: the model's own, ``num_classes`` at least.

    Raises:
        ValueError: an unknown name; the message lists similar ones. Or an argument out of range.
        TypeError: an argument that the model does not take, or one missing; the message lists those it takes.
    """
    if name not in _BUILDERS:
        near = difflib.get_close_matches(str(name), _BUILDERS, n=3) or list_models()
        raise ValueError(f"unknown model {name!r}; similar names: {', '.join(near)}")
    signature = inspect.signature(_BUILDERS[name])
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise TypeError(f"model {name!r}: {error}; it takes {', '.join(signature.parameters)}") from error
    return _BUILDERS[name](**arguments)
