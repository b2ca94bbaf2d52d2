from __future__ import annotations

import importlib.util

import pytest

from hasten import registry
from hasten.errors import MissingDependency, UnknownName
from hasten.registry import BUILT_IN, Entry, entries, load, register, registered


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(registry, "_registered", {"pass": {}, "engine": {}, "frontend": {}, "step": {}})


@pytest.mark.parametrize("kind", BUILT_IN)
def test_every_built_in_is_called_as_its_class_says(kind):
    for name, entry in BUILT_IN[kind].items():
        if not entry.missing:
            assert load(kind, name).name == name


@pytest.mark.parametrize("kind", BUILT_IN)
def test_every_extra_is_one_that_the_distribution_has(kind):
    extras = {entry.extra for entry in BUILT_IN[kind].values() if entry.extra}
    assert extras <= {"openvino", "text", "train"}


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(UnknownName, match="no pass is called 'flod'; did you mean 'fold'"):
        load("pass", "flod")


def test_what_is_not_installed_is_named_with_the_command_that_installs_it():
    register("engine", "far", Entry("hasten.nowhere:Far", ("not_installed_here",), "far"))
    with pytest.raises(MissingDependency, match=r"not_installed_here.*pip install 'hasten\[far\]'"):
        load("engine", "far")


def test_a_plug_in_without_an_extra_is_installed_by_its_modules():
    assert Entry("a:B", ("one", "two")).fix == "pip install one two"


def test_what_is_registered_is_found_and_told_to_children():
    entry = Entry("hasten.passes.fold:Fold")
    register("pass", "mine", entry)
    assert entries("pass")["mine"] is entry
    assert registered() == [("pass", "mine", entry)]
    assert load("pass", "mine").name == "fold"


def test_a_registered_entry_goes_before_a_built_in():
    register("pass", "fold", Entry("hasten.passes.fuse:Fuse"))
    assert load("pass", "fold").name == "fuse"


def test_asking_what_is_missing_imports_nothing():
    assert Entry("a:B", ("json", "not_installed_here")).missing == ("not_installed_here",)
    assert importlib.util.find_spec("not_installed_here") is None
