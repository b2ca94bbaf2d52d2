"""The page about dependencies names every one, and the base install brings no heavy one by accident."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements):
    return [re.split(r"[<>=!\[ ;]", item)[0] for item in requirements]


@pytest.mark.parametrize("name", [*names(PROJECT["dependencies"]), *EXTRAS])
def test_the_page_of_dependencies_names(name) -> None:
    assert f"`{name}`" in (ROOT / "docs" / "dependencies.md").read_text()


def test_torch_is_pinned_exactly() -> None:
    assert "torch==2.13.0" in EXTRAS["train"]


@pytest.mark.parametrize("heavy", ["torch", "openvino", "pyarrow", "pandas", "plotly", "scikit-learn", "onnx-ir"])
def test_the_base_install_does_not_ask_for(heavy) -> None:
    assert heavy not in names(PROJECT["dependencies"])
