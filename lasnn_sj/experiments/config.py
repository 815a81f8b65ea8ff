"""YAML files as typed dataclasses; errors name the key."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..runtime import files

T = TypeVar("T")
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


LARGEST = 1 << 20  # bytes of a configuration


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the file and the key."""


class _OnceLoader(yaml.SafeLoader):
    """Loader that refuses duplicate keys, of which PyYAML takes the last, and aliases.

    Nested aliases can expand a few lines to gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"duplicate key {key.value}", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; no code in it is run.

    Raises:
        ConfigError: the file is missing, is not valid YAML, or does not hold a mapping.
    """
    path = Path(path)
    if not path.is_file():
        known = [p.name for p in path.parent.glob("*.yaml")]
        known += [p.stem for p in (Path(__file__).parent / "configs").glob("*.yaml")]
        near = difflib.get_close_matches(path.name, known, n=3)
        raise ConfigError(f"{path} does not exist" + (f"; did you mean {' or '.join(near)}?" if near else ""))
    try:
        text = files.read_regular(path.resolve(), at_most=LARGEST).decode()
        mapping = yaml.load(text, _OnceLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, AttributeError) as error:
        # values such as 0b, 2024-13-01 or numbers of 5,000 digits raise exceptions of many types
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(mapping).__name__}")
    return mapping


def write(path: str | Path, mapping: dict[str, Any]) -> None:
    """Write a mapping as YAML in its order, atomically."""
    files.write(Path(path), yaml.safe_dump(mapping, sort_keys=False))


def build(kind: type[T], mapping: dict[str, Any], where: str, prefix: str = "") -> T:
    """Build a dataclass from a mapping, with nested dataclasses.

    Args:
        kind: type of the dataclass; its fields may be numbers, text, paths, ``Literal``, tuples of one type,
            mappings by name, other dataclasses, and unions of those.
        mapping: values by field name; a field without default must be there.
        where: named first in messages, such as the file.
        prefix: of the keys in messages.

    Raises:
        ConfigError: an unknown or missing key (with the nearest known one), or a value of another type.
    """
    hints, fields = get_type_hints(kind), {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for key, value in mapping.items():
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {prefix}{key}{_nearest(kind, str(key), prefix)}")
        values[key] = _value(hints[key], value, where, prefix + key)
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise ConfigError(f"{where}: {', '.join(prefix + name for name in missing)} must be given")
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {prefix}{error}") from error


def plain(value: object) -> Any:
    """Convert a dataclass to plain values that :func:`build` reads: mappings, lists, numbers and text."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def nearest(name: str, known: Sequence[str]) -> str:
    """Return ``"; did you mean X?"`` if a known name is similar, else ``"; known are ..."``."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _nearest(kind: type, key: str, prefix: str) -> str:
    """:func:`nearest` for a key, which may also be right but a level too high."""
    own = [field.name for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(key, own, n=1)
    near += [name for name in _dotted(kind) if name.rpartition(".")[2] == key]
    return f"; did you mean {prefix}{near[0]}?" if near else f"; known are {', '.join(own)}"


def _dotted(kind: type) -> Iterator[str]:
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield field.name
        if dataclasses.is_dataclass(hints[field.name]):
            yield from (f"{field.name}.{inner}" for inner in _dotted(hints[field.name]))


def _value(kind: Any, value: Any, where: str, key: str) -> Any:
    """Convert ``value`` to the type ``kind``."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: {key} must hold keys and values of its own, got {value!r}")
        return build(kind, value, where, f"{key}.")
    if get_origin(kind) in (Union, types.UnionType):
        for choice in get_args(kind):
            try:
                return _value(choice, value, where, key)
            except ConfigError:
                continue
        raise _wrong(kind, value, where, key)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: {key} must be a list, as [{value}], got {value!r}")
        (item, _) = get_args(kind)
        return tuple(_value(item, part, where, f"{key}[{index}]") for index, part in enumerate(value))
    if get_origin(kind) is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            raise ConfigError(f"{where}: {key} must hold names and values, got {value!r}")
        (_, item) = get_args(kind)
        return {name: _value(item, part, where, f"{key}.{name}") for name, part in value.items()}
    fits = {
        types.NoneType: value is None,
        bool: isinstance(value, bool),
        int: isinstance(value, int) and not isinstance(value, bool),
        str: isinstance(value, str),
        Path: isinstance(value, str),
    }
    if get_origin(kind) is Literal:
        if any(value == choice and type(value) is type(choice) for choice in get_args(kind)):
            return value
    elif kind is float:
        number = _number(value)
        if number is not None:
            return number
    elif fits[kind]:
        return Path(value) if kind is Path else value
    raise _wrong(kind, value, where, key)


def _number(value: Any) -> float | None:
    # YAML 1.1, which PyYAML reads, takes 1e-4 for text: it wants a point in a number
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _wrong(kind: Any, value: Any, where: str, key: str) -> ConfigError:
    words = " or ".join(_words(kind))
    choices = [str(choice) for part in (kind, *get_args(kind)) for choice in _choices(part)]
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    return ConfigError(
        f"{where}: {key} must be {words}, got {value!r}" + (f"; did you mean {near[0]}?" if near else "")
    )


def _choices(kind: Any) -> tuple:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _words(kind: Any) -> Iterator[str]:
    if get_origin(kind) in (Union, types.UnionType):
        for choice in get_args(kind):
            yield from _words(choice)
    elif get_origin(kind) is Literal:
        yield from (repr(choice) for choice in get_args(kind))
    elif kind is types.NoneType:
        yield "null"
    else:
        yield _WORDS[kind]
