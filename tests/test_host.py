"""What is said of this machine and of what is installed, and the files that a process may open."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hasten.host import allow_files, versions


def test_versions_are_looked_up_once() -> None:
    assert versions() is versions()
    assert versions()["python"].startswith("3.")


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "gets"),
    [(100, 400, 200, [200, 200, 400]), (100, 400, 900, [400, 400, 400]), (300, 400, 200, [300, 300, 400])],
    ids=["enough", "all that there are", "it has more"],
)
def test_a_process_asks_for_the_files_that_it_wants_and_gives_up_none(
    soft: int, hard: int, wanted: int, gets: list[int]
) -> None:
    """In a process of its own; it tells what it was told, and its limits after that."""
    code = (
        "import resource, sys; from hasten.host import allow_files; "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard})); "
        f"print([allow_files({wanted}), *resource.getrlimit(resource.RLIMIT_NOFILE)])"
    )
    assert json.loads(subprocess.check_output([sys.executable, "-c", code])) == gets


def test_a_system_that_allows_less_than_it_says_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(which: int, limits: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr("resource.getrlimit", lambda which: (100, 400))
    monkeypatch.setattr("resource.setrlimit", refused)
    assert allow_files(200) == 100
