"""What the finals say of those that were in them, and of the others."""

import contextlib
from types import SimpleNamespace

import pytest

from hasten.errors import OutOfMemory
from hasten.search import finals
from hasten.search.finals import as_certified

from .trials import ORIGINAL, certificate, trial


def test_a_stale_screening_does_not_put_a_plan_before_the_finalists() -> None:
    finalist, other = trial(3.3, 0.0, mark=1), trial(3.1, 0.0, mark=2)
    made = as_certified([ORIGINAL, finalist, other], [certificate(ORIGINAL.key, 1.0), certificate(finalist.key, 2.2)])
    speeds = {item.key: item.measurement.speedup.value for item in made}
    assert speeds[finalist.key] == pytest.approx(2.2)
    assert speeds[other.key] < speeds[finalist.key]


def test_what_runs_as_a_finalist_does_has_its_speed() -> None:
    finalist, twin = trial(3.3, 0.0, mark=1, skeleton="s"), trial(3.9, 0.0, mark=2, skeleton="s")
    made = as_certified([finalist, twin], [certificate(finalist.key, 2.2)])
    assert [item.measurement.speedup.value for item in made] == pytest.approx([2.2, 2.2])


def test_where_the_original_has_no_room_for_a_second_time_the_finals_go_on_without_it(monkeypatch) -> None:
    def full(bench, trial, *, name):
        raise OutOfMemory(name, "it went over its memory")

    noted = []
    bench = SimpleNamespace(original=lambda: ORIGINAL, note=noted.append)
    monkeypatch.setattr(finals, "_reopen", full)
    with contextlib.ExitStack() as stack:
        assert finals._open_twin(bench, stack) == []
    assert noted[0].startswith("the original is not compared with itself: ")
