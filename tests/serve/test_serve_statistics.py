"""What the figures say after requests whose number and fate are known."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from hasten.client.calls import numbers_of, phases_of
from hasten.deployment import Serving
from hasten.errors import BadRequest
from hasten.protocol.phases import PHASES
from hasten.serve.prometheus import escaped, exposition
from hasten.serve.repository import open_repository
from hasten.serve.service import Service
from hasten.serve.statistics import BOUNDS_NS, Histogram, Statistics
from hasten.serve.ticket import Marks
from serve.bundles import bundle, request, rows, run


@given(st.lists(st.integers(0, 10**12), max_size=50))
def test_a_histogram_counts_every_time_in_the_first_bucket_that_holds_it(times: list[int]) -> None:
    histogram = Histogram()
    histogram.add(np.array(times, np.int64))
    assert histogram.count == len(times)
    assert histogram.total_ns == sum(times)
    for i, bound in enumerate(BOUNDS_NS):
        assert sum(histogram.counts[: i + 1]) == sum(ns <= bound for ns in times)


def test_a_phase_that_was_skipped_has_no_length() -> None:
    marks, figures = Marks(), Statistics()
    marks.ns = [5, 6, 7, 0, 0, 20, 30, 31, 32, 40]
    figures.sent(marks)
    assert {name: phase.total_ns for name, phase in figures.phases.items()} == marks.phases_ns()


@given(st.lists(st.integers(0, 10**9), min_size=10, max_size=10))
def test_the_phases_of_a_request_add_up_to_its_total(lengths: list[int]) -> None:
    marks, figures = Marks(), Statistics()
    marks.ns = [int(at) for at in np.cumsum([1, *lengths[1:]])]
    figures.sent(marks)
    assert figures.total.total_ns == sum(p.total_ns for p in figures.phases.values()) == marks.ns[-1] - marks.ns[0]


@given(st.lists(st.lists(st.integers(0, 10**12), min_size=10, max_size=10).map(sorted), max_size=20))
def test_the_spans_of_the_statistics_extension_are_sums_over_the_answers(every: list[list[int]]) -> None:
    figures = Statistics()
    for ns in every:
        figures.answered(Marks(ns), rows=2)
    figures.failed(BadRequest("no such input"), spent_ns=7)
    told = figures.json("net", "1")["inference_stats"]
    assert figures.rows == 2 * len(every)
    ends = {
        "success": (2, 7),
        "queue": (2, 4),
        "compute_input": (4, 5),
        "compute_infer": (5, 6),
        "compute_output": (6, 7),
    }
    for name, (first, last) in ends.items():
        assert told[name] == {"count": len(every), "ns": sum(ns[last] - ns[first] for ns in every)}, name
    assert told["fail"] == {"count": 1, "ns": 7}


@given(st.lists(st.integers(0, 3 * 10**9), min_size=10, max_size=10), st.integers(0, 10**15))
def test_the_phases_that_a_client_is_told_add_up_to_the_time_until_its_answer_was_encoded(
    lengths: list[int], began: int
) -> None:
    marks = Marks()
    marks.ns = [began + int(at) for at in np.cumsum([1, *lengths[1:]])]
    told = marks.timing().decode()
    phases = phases_of(told)
    assert list(phases) == list(PHASES[:-1])
    assert sum(phases.values()) // 1000 == (marks.ns[8] - marks.ns[0]) // 1000
    assert all(abs(phases[name] - ns) <= 1000 for name, ns in marks.phases_ns().items() if name != "send")
    assert numbers_of(told) == {"rows": 0, "instance": 0}


def test_prometheus_reads_what_the_service_did(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, batch_sizes=(1, 4)))

    async def work() -> None:
        service = Service(open_repository(path))
        await service.start()
        await asyncio.gather(*[service.infer(request(rows(3, seed=s))) for s in range(5)])
        with pytest.raises(BadRequest):
            await service.infer(request(rows(0)))
        samples = {
            (
                sample.name,
                *(sample.labels[key] for key in ("phase", "size", "reason", "le") if key in sample.labels),
            ): sample.value
            for family in text_string_to_metric_families(exposition(service).decode())
            for sample in family.samples
            if "model" not in sample.labels or sample.labels["model"] == "net"
        }
        await service.stop()
        assert samples["hasten_ready",] == 1
        assert samples["hasten_rows_total",] == 15
        assert samples["hasten_batches_total", "4"] == 5
        assert samples["hasten_padded_rows_total",] == 5
        assert samples["hasten_refused_total", "bad_request"] == 1
        assert samples["hasten_worker_restarts_total",] == 0
        assert (samples["hasten_in_flight",], samples["hasten_queue_rows",], samples["hasten_workers",]) == (0, 0, 1)
        assert samples["hasten_request_seconds_count",] == 5
        assert all(samples["hasten_phase_seconds_count", phase] == 5 for phase in PHASES)
        phases = sum(samples["hasten_phase_seconds_sum", phase] for phase in PHASES)
        assert phases == pytest.approx(samples["hasten_request_seconds_sum",], rel=1e-9)

    run(work())


@given(st.text(), st.text())
def test_what_a_label_says_is_read_back(model: str, version: str) -> None:
    labels = f'model="{escaped(model)}",version="{escaped(version)}"'
    (family,) = text_string_to_metric_families(f"# TYPE hasten_workers gauge\nhasten_workers{{{labels}}} 3\n")
    (sample,) = family.samples
    assert (sample.labels, sample.value) == ({"model": model, "version": version}, 3)


def test_the_statistics_extension_counts_requests_rows_and_runs(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", serving=Serving(instances=1, batch_sizes=(1, 4)))

    async def work() -> None:
        service = Service(open_repository(path))
        await service.start()
        for seed in range(3):
            await service.infer(request(rows(2, seed=seed)))
        (entry,) = service.statistics()["model_stats"]
        config = service.config("net")
        await service.stop()
        assert (entry["inference_count"], entry["execution_count"]) == (6, 3)
        stats = entry["inference_stats"]
        assert {name: stats[name]["count"] for name in ("success", "fail", "queue", "compute_infer")} == {
            "success": 3,
            "fail": 0,
            "queue": 3,
            "compute_infer": 3,
        }
        inside = sum(stats[name]["ns"] for name in ("queue", "compute_input", "compute_infer", "compute_output"))
        assert inside == stats["success"]["ns"]
        assert entry["batch_stats"][0]["batch_size"] == 4
        assert config["max_batch_size"] == 4
        assert config["input"] == [{"name": "x", "data_type": "TYPE_FP32", "dims": [16]}]

    run(work())
