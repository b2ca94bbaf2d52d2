"""What the documentation says can be typed: every command parses, every name of ``hasten`` exists, every link leads."""

import ast
import re
import shlex
from pathlib import Path

import pytest

import hasten
from hasten.cli.app import make_app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


COMMANDS = sorted(
    {
        line.strip().split("#  ")[0]
        for page in PAGES
        for block in blocks(page, "bash")
        for line in block.splitlines()
        if line.startswith("hasten ")
    }
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_is_understood(command) -> None:
    tokens = shlex.split(command)[1:]
    function, bound, _ = make_app().parse_args(tokens, exit_on_error=False, print_error=False)
    assert callable(function)
    assert bound is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_python_names_what_there_is(page) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hasten":
                assert hasattr(hasten, node.attr)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_readme_has_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "hasten demo" in text
    assert "./check" in text
    assert len(text.splitlines()) <= 60, "one screen"
    assert "./check" in (ROOT / ".ci" / "run").read_text()
