"""The service's figures in Prometheus' text format. Needs the extra ``serve``.

The registry is made for one exposition, over what ``Statistics`` counted: nothing global, and no lock on the way of a
request.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from hasten.serve.composed import Composed
from hasten.serve.lifecycle import Version
from hasten.serve.service import Service
from hasten.serve.statistics import BOUNDS_NS, Histogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

LABELS = ("model", "version")


def exposition(service: Service) -> bytes:
    """Give every metric of every model that is routed to."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service.models(), ready=service.ready()))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, models: Iterable[Version], *, ready: bool) -> None:
        self._models = list(models)
        self._ready = ready

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("hasten_ready", "1 while every model takes requests.", value=float(self._ready))
        yield from self._times()
        yield from self._counts()
        yield from self._gauges()

    def _times(self) -> Iterator[Metric]:
        phases = HistogramMetricFamily(
            "hasten_phase_seconds", "Time of an answer in each of its phases.", labels=(*LABELS, "phase")
        )
        total = HistogramMetricFamily(
            "hasten_request_seconds", "Time of an answer, first byte in to last byte out.", labels=LABELS
        )
        for model in self._models:
            for phase, histogram in model.statistics.phases.items():
                phases.add_metric([model.name, model.version, phase], *_buckets(histogram))
            total.add_metric([model.name, model.version], *_buckets(model.statistics.total))
        yield phases
        yield total

    def _counts(self) -> Iterator[Metric]:
        rows = CounterMetricFamily("hasten_rows", "Rows that were answered.", labels=LABELS)
        padded = CounterMetricFamily("hasten_padded_rows", "Rows of padding that were run.", labels=LABELS)
        restarts = CounterMetricFamily("hasten_worker_restarts", "Workers that were replaced.", labels=LABELS)
        batches = CounterMetricFamily("hasten_batches", "Runs by their batch size.", labels=(*LABELS, "size"))
        refused = CounterMetricFamily(
            "hasten_refused", "Requests without an answer, by reason.", labels=(*LABELS, "reason")
        )
        for model in self._models:
            own, figures = [model.name, model.version], model.statistics
            rows.add_metric(own, figures.rows)
            padded.add_metric(own, figures.padded_rows)
            restarts.add_metric(own, figures.restarts)
            for size, times in figures.sizes.items():
                batches.add_metric([*own, str(size)], times.compute_infer.count)
            for reason, count in figures.refused.items():
                refused.add_metric([*own, reason], count)
        yield from (rows, padded, restarts, batches, refused)

    def _gauges(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("hasten_queue_rows", "Rows that wait for a run.", labels=LABELS)
        inside = GaugeMetricFamily("hasten_in_flight", "Requests that are inside.", labels=LABELS)
        workers = GaugeMetricFamily("hasten_workers", "Workers that take batches.", labels=LABELS)
        costs = GaugeMetricFamily(
            "hasten_batch_cost_seconds", "Estimated time of a run, by its batch size.", labels=(*LABELS, "size")
        )
        for model in self._models:
            own = [model.name, model.version]
            inside.add_metric(own, model.inside)
            if isinstance(model, Composed):
                continue
            waiting.add_metric(own, model.line.batcher.rows)
            workers.add_metric(own, model.pool.ready)
            for size in model.sizes:
                costs.add_metric([*own, str(size)], model.line.batcher.costs.ns(size) / 1e9)
        yield from (waiting, inside, workers, costs)


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Give cumulative counts by upper bound in seconds, and the sum in seconds."""
    found, so_far = [], 0
    for bound, count in zip((*(f"{ns / 1e9:g}" for ns in BOUNDS_NS), "+Inf"), histogram.counts, strict=True):
        so_far += int(count)
        found.append((bound, float(so_far)))
    return found, histogram.total_ns / 1e9
