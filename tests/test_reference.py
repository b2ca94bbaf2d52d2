"""The reference page is what the code says; no setting, metric, verb or error is undocumented."""

import importlib.util
from pathlib import Path

import pytest

from hasten import registry
from hasten.settings import settings_of

ROOT = Path(__file__).parents[1]


def page_from_code():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference()


def test_the_reference_page_is_up_to_date() -> None:
    pytest.importorskip("openvino", reason="the page holds every engine's settings")
    assert (ROOT / "docs" / "reference.md").read_text() == page_from_code(), "run: python docs/make_reference.py"


@pytest.mark.parametrize("name", registry.BUILT_IN["pass"])
def test_every_setting_says_what_it_means(name) -> None:
    assert all(setting.doc for setting in settings_of(registry.load("pass", name)))
