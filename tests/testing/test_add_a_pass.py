"""The how-to page on adding a pass: its files are written out and run as a reader would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-a-pass.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every Python block of the page, each in the file that its first line names."""
    folder = tmp_path_factory.mktemp("example")
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL):
        (folder / name).write_text(code)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_every_block_names_its_file(example):
    assert PAGE.read_text().count("```python") == len(list(example.iterdir())) == 3


def test_the_tests_on_the_page_pass(example):
    done = run(example, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "test_low_rank.py")
    assert done.returncode == 0, done.stdout


def test_the_tests_on_the_page_fail_when_the_pass_is_wrong(example, tmp_path):
    for path in example.glob("*.py"):
        broken = path.read_text().replace("left[:, :rank] * values[:rank]", "left[:, :rank]")
        (tmp_path / path.name).write_text(broken)
    assert run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_low_rank.py").returncode == 1


def test_the_pass_can_be_announced_to_a_plan(example):
    assert run(example, "announce.py").stdout == "fold > low-rank(energy=0.9) > onnxruntime\n"
