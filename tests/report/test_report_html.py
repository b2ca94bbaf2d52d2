import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from synthetic_result import SIGNATURE, make_result

from hasten.artifact import Artifact, Step
from hasten.report.html import render_html, write_html


class Page(HTMLParser):
    """Collects what a browser would run, fetch and show."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.texts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script" and dict(attrs).get("type") != "application/json":
            self.scripts.append("")
            self._inside = "run"

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "run":
            self.scripts[-1] += data
        elif self._inside not in ("script", "style"):
            self.texts.append(data)

    @property
    def shown(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("run")
    return Page(render_html(make_result(folder, extra=5)))


def test_the_page_fetches_nothing(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form")
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            assert name not in attributes, f"<{tag} {name}>"


def test_the_policy_allows_the_pages_own_scripts_and_no_request(page: Page) -> None:
    policy = next(
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "connect-src" not in rules
    assert "http" not in policy
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in page.scripts}
    assert {f"'sha256-{digest}'" for digest in hashes} == set(rules["script-src"].split())


def test_the_style_asks_for_nothing_from_outside(page: Page) -> None:
    assert not re.search(r"url\(|@import", render_html.__globals__["_asset"]("report.css"))


def test_the_main_numbers_are_there_without_a_script(page: Page) -> None:
    for text in (
        "MEETS 2.93 times faster than the original",
        "820 µs",
        "2.93x",
        "[2.90, 2.96]",
        "0.30 %",
        "fold > quantize-static(exclude=3 names, observer=mse) > openvino(threads=2)",
        "on 500 certify samples",
        "1.001x [0.996, 1.006], which covers 1",
        "Imaginary 9000 2-Core Processor",
    ):
        assert text in page.shown


def test_every_trial_is_listed_with_the_reason_it_came_to_nothing(page: Page) -> None:
    assert "this processor has no bfloat16" in page.shown
    assert "its bound of 1.9 ms is above the best so far" in page.shown
    assert sum(1 for tag, attributes in page.tags if tag == "tr" and "data-outcome" in attributes) == 15


def test_what_a_child_printed_is_text_on_the_page(page: Page) -> None:
    assert "<script>alert(1)</script>" in page.shown
    assert len(page.scripts) == 2


def test_the_chosen_models_lineage_and_the_deployment_are_shown(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"model")
    artifact = Artifact.of(tmp_path, "model.onnx", format="onnx", signature=SIGNATURE)
    artifact = artifact.after(Step(name="quantize-static", settings={"observer": "mse"}), source=None)
    (tmp_path / "deployment.toml").write_text('engine = "openvino"\n')
    shown = Page(render_html(make_result(tmp_path), chosen=artifact)).shown
    assert "How the chosen model was made" in shown
    assert "observer=mse" in shown
    assert 'engine = "openvino"' in shown


def test_an_unproven_verdict_says_how_many_samples_would_decide(tmp_path: Path) -> None:
    assert "About 900 more samples would decide." in Page(render_html(make_result(tmp_path, word="UNPROVEN"))).shown


def test_the_figures_on_the_page_are_json_that_cannot_end_their_element(tmp_path: Path) -> None:
    text = render_html(make_result(tmp_path, note="</script><script>alert(2)</script>"))
    inside = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert inside
    assert set(msgspec.json.decode(inside[1])) == {"frontier", "operators"}
    assert "<script>alert(2)" not in text


def test_writing_the_page_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_html(make_result(tmp_path), path) == path
    assert path.read_text().startswith("<!DOCTYPE html>")
