from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta

from hasten.errors import InvalidSetting, UnknownName
from hasten.settings import Choice, Doc, build, settings_of, values_of


@dataclass(frozen=True, kw_only=True)
class Example:
    name: ClassVar[str] = "example"

    target: str
    rank: Annotated[int, Doc("columns kept"), Choice((4, 8)), Meta(ge=1)] = 8
    kind: Annotated[Literal["a", "b"], Doc("which one")] = "a"
    share: float | None = None
    names: tuple[str, ...] = ()
    table: dict[str, int] = field(default_factory=dict)


def test_a_setting_is_declared_once_and_read_everywhere():
    target, rank, kind, share, *_ = settings_of(Example)
    assert (target.name, target.required, target.doc) == ("target", True, "")
    assert (rank.default, rank.doc, rank.choices, rank.type_name) == (8, "columns kept", (4, 8), "int")
    assert kind.type_name == "Literal['a', 'b']"
    assert share.default is None
    assert not share.required


def test_a_class_variable_is_no_setting():
    assert "name" not in [setting.name for setting in settings_of(Example)]


def test_strings_are_read_as_the_setting_s_type():
    made = build(Example, {"target": "x", "rank": "4", "share": "0.5"})
    assert (made.rank, made.share) == (4, 0.5)


@given(
    rank=st.integers(1, 99),
    kind=st.sampled_from(("a", "b")),
    share=st.none() | st.floats(0, 1),
    names=st.lists(st.text(max_size=5), max_size=3),
)
def test_plain_values_build_the_same_again(rank, kind, share, names):
    example = Example(target="x", rank=rank, kind=kind, share=share, names=tuple(names), table={"a": rank})
    assert build(Example, values_of(example)) == example


def test_an_unknown_setting_offers_the_nearest():
    with pytest.raises(UnknownName, match="no setting of example is called 'rnak'; did you mean 'rank'"):
        build(Example, {"target": "x", "rnak": 4})


@pytest.mark.parametrize(
    ("key", "value"), [("rank", 0), ("rank", "many"), ("rank", 1.5), ("kind", "c"), ("names", 3), ("share", "half")]
)
def test_a_value_that_cannot_be_is_named_with_its_setting(key, value):
    with pytest.raises(InvalidSetting, match=f"example: {key} = ") as error:
        build(Example, {"target": "x", key: value})
    assert "\n" not in str(error.value)


def test_a_required_setting_that_is_missing_is_named():
    with pytest.raises(InvalidSetting, match="'target' is needed"):
        build(Example, {})
