"""Settings, declared once as the fields of a frozen dataclass.

The command line's flags, the JSON of a plan, the help, the reference page and the search space are read from
the same fields::

    rank: Annotated[int, Doc("columns kept"), Choice((4, 8, 16)), Meta(ge=1)] = 8
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from hasten.artifact import Json
from hasten.errors import InvalidSetting, UnknownName

T = TypeVar("T")


@dataclass(frozen=True)
class Doc:
    """What a setting means, in a few words."""

    text: str


@dataclass(frozen=True)
class Choice:
    """The values that a search tries. To allow no others, declare the type a ``Literal``."""

    values: tuple[Json, ...]


@dataclass(frozen=True)
class Setting:
    """One field of a pass or an engine, as the help and the search see it."""

    name: str
    type: Any
    default: Json
    required: bool
    doc: str
    choices: tuple[Json, ...]

    @property
    def type_name(self) -> str:
        """The type as a person would write it."""
        return inspect.formatannotation(_bare(self.type)).replace("typing.", "")


def settings_of(cls: type) -> tuple[Setting, ...]:
    """List the settings of a pass or an engine, in the order they are declared.

    They are read once: evaluating annotations takes a millisecond of pure Python, and a server that loads a version
    beside one that answers has none to spare.
    """
    return _settings_of(cls)


@functools.cache
def _settings_of(cls: type) -> tuple[Setting, ...]:
    hints = get_type_hints(cls, include_extras=True)
    found = []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        notes = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        docs = [note.text for note in notes if isinstance(note, Doc)]
        choices = [note.values for note in notes if isinstance(note, Choice)]
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = None if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        found.append(
            Setting(
                name=field.name,
                type=hint,
                default=default,
                required=required,
                doc=docs[0] if docs else "",
                choices=choices[0] if choices else (),
            )
        )
    return tuple(found)


def build(cls: type[T], values: Mapping[str, Json], *, name: str | None = None) -> T:
    """Make a ``cls`` from plain values, as JSON or the command line give them.

    Args:
        cls: A pass, an engine, or any dataclass of settings.
        values: Setting by name. A string is read as the setting's type ("4" as 4).
        name: How messages call ``cls``; its registry name by default.

    Raises:
        UnknownName: there is no such setting.
        InvalidSetting: a value has another type, is out of range, or a required one is missing.
    """
    called = name or str(getattr(cls, "name", cls.__name__))
    declared = {setting.name: setting for setting in settings_of(cls)}
    ready: dict[str, Any] = {}
    for key, value in values.items():
        if key not in declared:
            raise UnknownName(f"setting of {called}", key, declared)
        try:
            ready[key] = msgspec.convert(value, declared[key].type, strict=False)
        except (msgspec.ValidationError, ValueError) as error:
            raise InvalidSetting(f"{called}: {key} = {value!r}: {error}".replace("\n", " ")) from error
    for key, setting in declared.items():
        if setting.required and key not in ready:
            raise InvalidSetting(f"{called}: the setting {key!r} is needed ({setting.doc})")
    return cls(**ready)


def values_of(instance: Any) -> dict[str, Json]:
    """Give every setting of ``instance`` as plain values: ``build(type(x), values_of(x)) == x``."""
    plain = msgspec.to_builtins({f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)})
    return dict(plain)


def _bare(hint: Any) -> Any:
    """Give a type without its notes, also inside a union."""
    if get_origin(hint) is Annotated:
        return _bare(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return functools.reduce(operator.or_, map(_bare, get_args(hint)))
    return hint
