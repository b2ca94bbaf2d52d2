"""Values with units as a person types them: ``5ms``, ``20m``, ``1%``, ``5MB``; and parts, as ``name:key=value``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from cyclopts import Parameter, Token

from hasten.artifact import Json
from hasten.errors import InvalidSetting
from hasten.plan import Part

SECONDS: Mapping[str, float] = {
    "ns": 1e-9,
    "us": 1e-6,
    "µs": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "m": 60.0,
    "min": 60.0,
    "h": 3600.0,
}
BYTES: Mapping[str, float] = {
    "B": 1,
    "kB": 1e3,
    "KB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[+-]?[0-9]+)?)\s*(\S*)\s*", re.IGNORECASE)


def seconds(text: str) -> float:
    """Read a duration in seconds. Raises ValueError where the unit is missing: 5 could be anything."""
    return _read(text, SECONDS, "a time with its unit, as 5ms, 90s or 20m")


def seconds_or_none(text: str) -> float:
    """Read a duration in seconds, which may be none at all: ``0s``, or ``0``. Raises as ``seconds``."""
    found = _NUMBER.fullmatch(text)
    return 0.0 if found and not float(found[1]) and found[2] in ("", *SECONDS) else seconds(text)


def nanoseconds(text: str) -> float:
    """Read a duration in nanoseconds. Raises as ``seconds``."""
    return round(seconds(text) * 1e9, 3)


def size(text: str) -> int:
    """Read a size in bytes. Raises ValueError."""
    return int(_read(text, BYTES, "a size with its unit, as 500kB, 5MB or 1GiB"))


def share(text: str) -> float:
    """Read a share from 0 to 1, as ``1%`` or ``0.01``. Raises ValueError for what lies outside."""
    found = _NUMBER.fullmatch(text)
    if found is None or found[2] not in ("", "%"):
        raise ValueError(f"{text!r} is no share; write it as 1% or 0.01")
    value = float(found[1]) / (100 if found[2] else 1)
    if not 0 <= value <= 1:
        raise ValueError(f"{text!r} is {value:g}, and a share lies between 0 and 1; write one per cent as 1% or 0.01")
    return round(value, 12)


def positive(text: str) -> float:
    """Read a number above 0. Raises ValueError."""
    return _read(text, {"": 1.0, "/s": 1.0}, "a number above 0")


def numbers(text: str) -> tuple[int, ...]:
    """Read whole numbers above 0, as ``1,2,4``. Raises ValueError."""
    found = words(text)
    if not all(word.isdecimal() and int(word) > 0 for word in found):
        raise ValueError(f"{text!r} is no list of whole numbers above 0; write it as 1,2,4")
    return tuple(int(word) for word in found)


def seed(text: str) -> int:
    """Read what random numbers begin with. Raises ValueError for what is no whole number from 0 on."""
    if not text.strip().isdecimal():
        raise ValueError(f"{text!r} is no seed; write a whole number, 0 or above")
    return int(text)


def words(text: str) -> tuple[str, ...]:
    """Read names, as ``a,b``. Raises ValueError for an empty one."""
    found = tuple(word.strip() for word in text.split(","))
    if not all(found):
        raise ValueError(f"{text!r} has an empty name; write it as a,b")
    return found


def pairs(text: str) -> dict[str, str]:
    """Read ``key=value,key=value``. A value may be JSON in brackets, with commas of its own. Raises ValueError."""
    found: dict[str, str] = {}
    for piece in _outside_brackets(text):
        key, equals, value = piece.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{piece!r} is no key=value")
        found[key.strip().replace("-", "_")] = value.strip()
    return found


def part(text: str) -> Part:
    """Read a pass or an engine: ``name`` or ``name:key=value,key=value``.

    Raises:
        InvalidSetting: what follows the colon is no list of settings.
    """
    name, colon, rest = text.partition(":")
    try:
        return Part(name, settings(rest) if colon else {})
    except ValueError as error:
        raise InvalidSetting(f"{text!r}: {error}; write it as {name}:key=value,key=value") from error


def settings(text: str) -> dict[str, Json]:
    """Read settings; what stands in brackets is JSON, the rest strings that the settings' types will read."""
    return {key: _value(key, value) for key, value in pairs(text).items()}


def read_by(read: Callable[[str], Any], *, metavar: str | None = None) -> Parameter:
    """Make a command line parameter that reads its one word with ``read``."""

    def convert(_: Any, tokens: Sequence[Token]) -> Any:
        return read(tokens[0].value)

    return Parameter(converter=convert, n_tokens=1, accepts_keys=False, metavar=metavar or METAVARS.get(read))


def _read(text: str, units: Mapping[str, float], wanted: str) -> float:
    found = _NUMBER.fullmatch(text)
    if found is None or found[2] not in units:
        raise ValueError(f"{text!r} is not {wanted}")
    value = float(found[1]) * units[found[2]]
    if value <= 0:
        raise ValueError(f"{text!r} is not {wanted}: it must be above 0")
    return value


def _value(key: str, text: str) -> Json:
    if not text.startswith(("[", "{")):
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise ValueError(f"{key} = {text} is no JSON ({error})") from error


def _outside_brackets(text: str) -> list[str]:
    """Split at the commas that are not inside brackets or quotes."""
    pieces, depth, quoted = [""], 0, False
    for char in text:
        quoted ^= char == '"'
        depth += 0 if quoted else (char in "[{") - (char in "]}")
        if char == "," and depth == 0 and not quoted:
            pieces.append("")
        else:
            pieces[-1] += char
    return pieces


METAVARS: Mapping[Callable[[str], Any], str] = {
    seconds: "TIME",
    seconds_or_none: "TIME",
    nanoseconds: "TIME",
    size: "SIZE",
    share: "SHARE",
    positive: "NUMBER",
    numbers: "N,N",
    seed: "N",
    words: "NAME,NAME",
    pairs: "KEY=VALUE,...",
}
"""How the help writes what each reader takes."""
