import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from synthetic_result import SIGNATURE, make_result

from hasten.artifact import Artifact, Step
from hasten.report import format as fmt
from hasten.report.html import render_html, write_html
from hasten.search.journal import Journal
from hasten.search.result import Result


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
    assert not re.search(r"url\(|@import", render_html.__globals__["asset"]("report.css"))


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
    assert set(msgspec.json.decode(inside[1])) == {"frontier", "operators", "path"}
    assert "<script>alert(2)" not in text


def test_writing_the_page_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    assert write_html(make_result(tmp_path), path) == path
    assert path.read_text().startswith("<!DOCTYPE html>")


def with_finalist(result: Result, **changes: object) -> Result:
    """Change the measurement of the chosen plan's certificate."""
    first, *others = result.certificates
    measurement = replace(first.measurement, **changes)  # type: ignore[arg-type]
    return replace(result, certificates=(replace(first, measurement=measurement), *others))


def test_finalists_show_how_long_they_load_and_their_first_run_takes(page: Page) -> None:
    assert "30.0 ms first run 3.28 ms" in page.shown
    assert "taken 2026-03-01T12:00:00Z" in page.shown
    assert "over the bare process of its engine" in page.shown


def test_the_second_limit_stands_beside_the_first(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    bound = result.certificates[0].measurement.bound
    assert bound
    assert bound.winograd_ns
    shown = Page(render_html(result)).shown
    assert "with Winograd" in shown
    assert fmt.duration(bound.winograd_ns) in shown
    without = replace(bound, winograd_ns=None)
    plain = replace(result, certificates=with_finalist(result, bound=without).certificates[:1])
    assert "Winograd" not in Page(render_html(plain)).shown


def test_what_is_doubtful_about_a_finalist_is_said(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    before = Page(render_html(result)).shown
    measurement = result.certificates[0].measurement
    assert measurement.bound
    doubtful = with_finalist(
        result,
        latency=replace(measurement.latency, settled=False),
        bound=replace(measurement.bound, profile_scale=0.91, unpriced=("NonZero",)),
    )
    after = Page(render_html(doubtful)).shown
    for text in ("never settled while warming up", "no arithmetic for NonZero", "scaled to 91 %"):
        assert text not in before
        assert text in after


def test_the_journals_notes_are_on_the_page_where_there_is_a_journal(tmp_path: Path) -> None:
    assert "What the search noted" not in Page(render_html(make_result(tmp_path))).shown
    journal = Journal.open(tmp_path / "journal.sqlite")
    journal.note("skipped fold > onnxruntime: its bound is <b>above</b> the best")
    shown = Page(render_html(make_result(tmp_path))).shown
    assert "What the search noted while it ran (1)" in shown
    assert "skipped fold > onnxruntime: its bound is <b>above</b> the best" in shown


def test_a_journal_that_cannot_be_read_is_said_and_does_not_lose_the_page(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_bytes(b"this is no database, and it is long enough to be looked at" * 4)
    assert "file is not a database" in Page(render_html(make_result(tmp_path))).shown


def test_a_finalist_that_fell_is_named_with_its_reason_on_the_page(tmp_path: Path) -> None:
    result = make_result(tmp_path)
    fallen = replace(result, fallen={result.trials[2].key: "the child process died"})
    shown = Page(render_html(fallen)).shown
    assert "Fell out of the finals: openvino(threads=2) : the child process died" in shown
