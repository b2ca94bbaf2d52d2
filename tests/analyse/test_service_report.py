"""What is shown of a service: the same tables everywhere, a page that fetches nothing, numbers for other tools."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import planted
import pytest
from rich.console import Console

from hasten.analyse.analysis import Analysis, MeanPart, analyse_run, load_point
from hasten.analyse.host_samples import read_host, write_host
from hasten.analyse.simulate import poisson, simulate
from hasten.errors import StoreError, UnknownName
from hasten.load.objective import read_objective
from hasten.report.export import EXPORTERS, export, scalars
from hasten.report.service import Table, csv_of, markdown_of, summary, tables_of
from hasten.report.service_html import render_service_html
from hasten.report.service_table import drawn, service_table


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    run, host = planted.throttled(0)
    points = tuple(
        load_point(planted.record(simulate(planted.service(), poisson(rate, 1500, seed=0), seed=0)))
        for rate in (200, 600)
    )
    return replace(analyse_run(run, objective=read_objective("p99 <= 20ms"), host=host), curve=points)


def test_an_analysis_says_its_verdict_and_its_cause(analysis: Analysis) -> None:
    text = "\n".join(summary(analysis))
    assert "MISSES: p99 <= 20ms" in text
    assert "held back" in text


def test_every_percentile_is_shown_with_its_count_and_interval(analysis: Analysis) -> None:
    table = next(table for table in tables_of(analysis) if table.key == "percentiles")
    p99 = next(row for row in table.rows if row[0] == "p99")
    assert re.fullmatch(r"[\d.]+ ms", p99[1])
    assert " to " in p99[2]
    assert p99[3] == "3000"
    p999 = next(row for row in table.rows if row[0] == "p99.9")
    assert "4603 are needed" in p999[2]


def test_all_tables_have_as_many_cells_as_columns(analysis: Analysis) -> None:
    for table in tables_of(analysis):
        assert {len(row) for row in table.rows} == {len(table.columns)}, table.key


def test_the_terminal_shows_it_in_eighty_columns(analysis: Analysis) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(service_table(analysis))
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "Why the slow ones were slow" in text


class _Loads(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href")]


def test_the_terminal_shows_cells_with_their_brackets() -> None:
    screen = io.StringIO()
    Console(file=screen, width=80).print(drawn(Table("t", "Told", ("load",), (("burst[/b] of x[ids]",),))))
    assert "burst[/b] of x[ids]" in screen.getvalue()


def test_the_page_stands_alone(analysis: Analysis) -> None:
    page = render_service_html(analysis)
    loads = _Loads()
    loads.feed(page)
    assert loads.found == []
    assert "default-src &#39;none&#39;" in page
    for name in ("curve", "waterfall", "distribution", "timeline"):
        assert f'id="figure-{name}"' in page


def test_a_models_name_cannot_put_markup_into_the_page(analysis: Analysis) -> None:
    bad = replace(analysis, asked=replace(analysis.asked, model="<script>alert(1)</script>"))
    assert "<script>alert(1)" not in render_service_html(bad)
    assert "<script>" not in markdown_of(bad)


def test_markdown_has_a_table_for_each(analysis: Analysis) -> None:
    text = markdown_of(analysis)
    for table in tables_of(analysis):
        assert f"**{table.title}**" in text
    assert all(line.count("|") >= 2 for line in text.splitlines() if line.startswith("|"))


def test_csv_has_every_percentile_of_every_load(analysis: Analysis) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_of(analysis))))
    assert len([row for row in rows if row["figure"] == "p99"]) == 3
    assert {row["unit"] for row in rows} == {"ns", "requests/s", "samples/s", "share"}


def test_a_server_without_phases_is_shown_by_its_means() -> None:
    simulated = simulate(planted.service(), poisson(300, 1000, seed=0), seed=0)
    means = (MeanPart(part="queue", mean_ns=1e6, n=900), MeanPart(part="compute_infer", mean_ns=2e6, n=900))
    found = analyse_run(planted.record(simulated, phases=False), means=means)
    table = next(table for table in tables_of(found) if table.key == "phases")
    assert any(row[0] == "compute_infer (mean)" and "n 900" in row[1] for row in table.rows)
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_scalars_are_plain_numbers(analysis: Analysis) -> None:
    found = scalars(analysis)
    assert found["requests/ok"] == 3000.0
    assert found["response_ms/p99_low"] <= found["response_ms/p99"] <= found["response_ms/p99_high"]
    assert found["slow_by/throttled"] == 1.0


def test_an_exporter_that_is_not_there_is_named(analysis: Analysis, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="did you mean 'mlflow'"):
        export("mlfow", analysis, tmp_path)


@pytest.mark.filterwarnings("default")
def test_tensorboard_reads_what_is_exported(analysis: Analysis, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    export("tensorboard", analysis, tmp_path)
    (events,) = tmp_path.glob("events.out.tfevents.*")
    data = events.read_bytes()
    assert b"response_ms/p99" in data
    assert b"curve_ms/p50" in data


@pytest.mark.filterwarnings("default")
def test_mlflow_finds_the_run_that_is_exported(
    analysis: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    export("mlflow", analysis, tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = tracking.MlflowClient(tracking_uri=tmp_path.resolve().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("hasten").experiment_id])
    assert run.data.metrics["requests/ok"] == 3000.0
    assert run.data.params["objective"] == "p99 <= 20ms"


def test_every_exporter_names_what_installs_it() -> None:
    assert all(command == f"pip install 'hasten[{name}]'" for name, (_, command) in EXPORTERS.items())


def test_host_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    samples = planted.host([(0, 80 * planted.MS)], 1000 * planted.MS)
    write_host(samples, tmp_path)
    again = read_host(tmp_path)
    assert again is not None
    assert (again.cpu_ns == samples.cpu_ns).all()
    (tmp_path / "host.npy").write_bytes(b"\x93NUMPY nonsense")
    with pytest.raises(StoreError, match="cannot be read"):
        read_host(tmp_path)


def test_a_standstill_is_time_without_progress() -> None:
    samples = planted.host([(100 * planted.MS, 180 * planted.MS)], 1000 * planted.MS)
    inside = samples.spent("cpu_ns", planted.BEGAN + 100 * planted.MS, planted.BEGAN + 180 * planted.MS)
    outside = samples.spent("cpu_ns", planted.BEGAN + 300 * planted.MS, planted.BEGAN + 380 * planted.MS)
    assert inside == pytest.approx(0.0, abs=1e3)
    assert outside == pytest.approx(72 * planted.MS, rel=0.01)
    assert samples.spent("throttled_ns", planted.BEGAN, planted.BEGAN + 1) is None


def test_json_of_an_analysis_has_no_infinite_number(analysis: Analysis) -> None:
    json.loads(msgspec.json.encode(analysis), parse_constant=lambda word: pytest.fail(word))
