"""The reference page is what the code says; no setting, metric, verb or error is undocumented."""

import importlib.util
import re
from pathlib import Path

import pytest

from hasten import registry
from hasten.deployment import Serving
from hasten.protocol.codes import CODES
from hasten.protocol.phases import PHASES
from hasten.serve.prometheus import exposition
from hasten.serve.repository import Repository
from hasten.serve.service import Service
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


def test_every_setting_of_serving_says_what_it_means() -> None:
    assert all(setting.doc for setting in settings_of(Serving))


def test_every_metric_of_the_server_is_on_its_page(tmp_path) -> None:
    service = Service(Repository(tmp_path))
    page = (ROOT / "docs" / "how-to" / "monitor.md").read_text()
    types = re.findall(r"^# TYPE (\w+) (\w+)$", exposition(service).decode(), flags=re.MULTILINE)
    assert len(types) > 10
    assert [f"`{name}` | {kind}" for name, kind in types if f"| `{name}` | {kind} |" not in page] == []


def test_every_phase_and_reason_is_on_the_page_of_metrics() -> None:
    page = (ROOT / "docs" / "how-to" / "monitor.md").read_text()
    words = {*PHASES, *(error.reason for error in CODES)} - {"no_answer", "overloaded"}  # a client's, and one of four
    assert {word for word in words if f"`{word}`" not in page} == set()
