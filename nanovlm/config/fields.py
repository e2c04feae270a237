"""Read configs from JSON, compare them, and check their values."""

import dataclasses
import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable
from typing import Literal

from nanovlm.errors import UserError


def pick(table: dict, key: str, field: str):
    """Return `table[key]`, or raise UserError that names the field, the value and the known keys."""
    if key not in table:
        raise UserError(f"{field} = {key!r} is unknown; there are {', '.join(table)}")
    return table[key]


def read_weights(entries: Iterable[str], field: str, example: str) -> dict[str, float]:
    """Read entries name=weight, or a bare name for weight 1. Raises UserError that names the field and the entry."""
    weights = {}
    for entry in entries:
        name, _, weight = entry.partition("=")
        try:
            value = float(weight or 1)
        except ValueError:
            value = math.nan
        check(
            name and math.isfinite(value), f"{field} has {entry!r}, which must be name or name=weight, as in {example}"
        )
        check(name not in weights, f"{field} names {name} twice")
        weights[name] = value
    return weights


def from_dict(cls, data, where: str = ""):
    """Build the dataclass `cls` from parsed JSON.

    Missing fields take their defaults. Raises UserError that names the field and the nearest known
    one for an unknown field, and the expected type for a value of another type.
    """
    if not isinstance(data, dict):
        raise UserError(f"{where or cls.__name__} must be a JSON object, got {data!r}")
    known = {f.name for f in dataclasses.fields(cls)}
    for name in sorted(data.keys() - known):
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise UserError(f"unknown field {where + name!r}; the nearest known field is {where + nearest!r}")
    hints = typing.get_type_hints(cls)
    return cls(**{name: _convert(hints[name], value, where + name) for name, value in data.items()})


def differences(a, b, where: str = "") -> list[str]:
    """List the dotted fields in which two configs of one class differ, with both values."""
    lines = []
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if dataclasses.is_dataclass(x) and dataclasses.is_dataclass(y):
            lines += differences(x, y, f"{where}{f.name}.")
        elif x != y:
            lines.append(f"{where}{f.name}: {x!r} against {y!r}")
    return lines


@functools.cache
def comments(cls) -> dict[str, str]:
    """Return the comment above each field of a config class, in one line."""
    found, lines = {}, []
    for line in map(str.strip, inspect.getsource(cls).splitlines()):
        if line.startswith("#"):
            lines.append(line.lstrip("# "))
        else:
            if field := re.match(r"(\w+): ", line):
                found[field[1]] = " ".join(lines)
            lines = []
    return found


def _convert(hint, value, where):
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where + ".")
    if hint is float and type(value) in (int, float) and abs(value) < 1e300:
        return float(value)
    if origin is tuple and isinstance(value, list | tuple):
        if args[-1] is not Ellipsis and len(args) != len(value):
            raise UserError(f"{where} must have {len(args)} entries, got {value!r}")
        return tuple(_convert(args[0], x, f"{where}[{i}]") for i, x in enumerate(value))
    if origin is Literal and value in args:
        return value
    if origin is types.UnionType and value is None and type(None) in args:
        return None
    if origin is types.UnionType:
        return _convert(args[0], value, where)
    if type(value) is hint:
        return value
    expected = f"one of {list(args)}" if origin is Literal else getattr(hint, "__name__", str(hint))
    raise UserError(f"{where} must be {expected}, got {value!r}")


def integers(prefix, config):
    return [(f"{prefix}.{k}", v) for k, v in vars(config).items() if type(v) is int]


def check_finite(config, where: str = ""):
    """Raise UserError for a number in a config, however deep, that is infinite or NaN."""
    for f in dataclasses.fields(config):
        _check_finite(getattr(config, f.name), where + f.name)


def _check_finite(value, name: str):
    if dataclasses.is_dataclass(value):
        check_finite(value, f"{name}.")
    elif isinstance(value, tuple):
        for part in value:
            _check_finite(part, name)
    else:
        check(not isinstance(value, float) or math.isfinite(value), f"{name} = {value} must be a finite number")


def check(ok, message):
    if not ok:
        raise UserError(message)


def divides(name, divisor, other, number):
    check(number % divisor == 0, f"{name} = {divisor} must divide {other} = {number}")
