"""MLPerf's accuracy mode: every sample once through the system that the load is put on, and how good its answers are.

Source: MLCommons, "MLPerf Inference Rules" (v5), section "LoadGen operation": accuracy is measured in a run of its own,
over all samples, on the same system under test and over the same protocol as the performance run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from scipy import stats

from hasten.client.client import Client
from hasten.deployment import FILE, read_deployment
from hasten.engine import Engine
from hasten.errors import BadInput, InvalidSetting, ServeError, ServerFault, Untrusted
from hasten.isolation import Progress
from hasten.load.target import Target
from hasten.measurement import Estimate
from hasten.metrics import Metric, default_metric, load_metric
from hasten.plan import Part, load_part
from hasten.samples import Samples
from hasten.tensors import Array, Feed

UNDER_WAY = 8
"""Requests at once: enough that a server can batch them, few enough that none is refused."""

LARGEST_ANSWERS_BYTES = 2 << 30
RESAMPLES = 2000
DRAWN_AT_ONCE = 4_000_000
"""Samples that are drawn at a time: each takes some bytes."""

Infer = Callable[[Feed], Feed]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """The metric of all answers, with its 95 % interval: of a proportion by Wilson, of anything else by bootstrap."""

    metric: str
    higher_is_better: bool
    value: Estimate
    seconds: float


Word = Literal["MEETS", "MISSES", "INCONCLUSIVE"]


def measure_accuracy(
    target: Target,
    samples: Samples,
    *,
    metric: str | None = None,
    batch: int = 1,
    timeout_s: float = 10.0,
    progress: Progress | None = None,
) -> Accuracy:
    """Send every sample once and judge the answers by their labels.

    Args:
        target: A server of the Open Inference Protocol, or a deployment's session.
        samples: With labels.
        metric: A name of ``hasten.metrics`` or a function of the user's; by default what suits the labels.
        batch: Rows in a request; the last one has what is left.
        timeout_s: Of each request.
        progress: Told how far it is.

    Raises:
        BadInput: there are no labels, or the answers take more than ``LARGEST_ANSWERS_BYTES``.
        InvalidSetting: an ``http`` endpoint, whose answers nobody here can read; ``batch`` below 1.
        ServeError: a request got no good answer: then there is no accuracy.
    """
    if samples.labels is None:
        raise BadInput("accuracy needs labels, and these samples have none; name their column with --label")
    if batch < 1:
        raise InvalidSetting(f"batch is {batch}, and must be 1 or more")
    if metric is not None:
        _of_labels(metric)  # told before the first request
    began_s = time.perf_counter()
    with _open(target, timeout_s) as (infer, at_once):
        answers = _answers(infer, at_once, samples, batch, progress)
    judge = _of_labels(metric or default_metric(samples.labels, answers))
    return Accuracy(
        metric=judge.name,
        higher_is_better=judge.higher_is_better,
        value=_estimate(judge, answers, samples.labels),
        seconds=time.perf_counter() - began_s,
    )


def _of_labels(name: str) -> Metric:
    found = load_metric(name)
    if found.needs != "labels":
        raise InvalidSetting(f"the metric {name!r} compares two models; name one that looks at labels")
    return found


def meets(found: Accuracy, wanted: float) -> Word:
    """Say whether the target quality is proven reached, proven missed, or neither."""
    low, high = found.value.low, found.value.high
    if not found.higher_is_better:
        low, high, wanted = -high, -low, -wanted
    return "MEETS" if low >= wanted else "MISSES" if high < wanted else "INCONCLUSIVE"


@contextmanager
def _open(target: Target, timeout_s: float) -> Iterator[tuple[Infer, int]]:
    """Give what answers a feed, and how many may be asked at once."""
    if target.protocol == "http":
        raise InvalidSetting("the answers of any http endpoint cannot be read; accuracy needs an inference protocol")
    if target.protocol == "session":
        path = Path(target.url)
        deployment, artifact = read_deployment(path / FILE if path.is_dir() else path)
        engine: Engine = load_part("engine", Part(deployment.engine, deployment.settings))
        with closing(engine.open(artifact)) as session:
            yield session.run, 1
        return
    binary = target.protocol != "rest-json"
    with Client(target.url, binary=binary, api_key=target.api_key, certificate=target.certificate) as client:

        def infer(feed: Feed) -> Feed:
            return client.infer(target.model, feed, version=target.version, timeout_s=timeout_s).outputs

        yield infer, UNDER_WAY


def _answers(infer: Infer, at_once: int, samples: Samples, batch: int, progress: Progress | None) -> dict[str, Array]:
    """Give the outputs of all samples, [n, ...], in their order."""
    n = len(samples)
    found: dict[str, Array] = {}

    def ask(start: int) -> tuple[int, int, Feed]:
        chosen = slice(start, min(start + batch, n))
        rows = chosen.stop - start
        try:
            return start, rows, infer({k: np.ascontiguousarray(v) for k, v in samples.feed(chosen).items()})
        except ServeError as error:
            raise type(error)(f"sample {start} of {n} got no good answer: {error}") from error

    pool = ThreadPoolExecutor(at_once, "hasten-accuracy")
    try:
        for start, rows, outputs in pool.map(ask, range(0, n, batch)):
            for name, array in outputs.items():
                kept = found.get(name)
                if array.shape != (rows, *(array if kept is None else kept).shape[1:]):
                    raise ServerFault(f"output {name!r} of sample {start} has shape {list(array.shape)}")
                if kept is None:
                    kept = found[name] = _room(name, array, n)
                kept[start : start + rows] = array
            if progress:
                progress(f"{start + rows} of {n} samples", (start + rows) / n)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for no more than what is under way
    return found


def _room(name: str, first: Array, n: int) -> Array:
    n_bytes = first.nbytes // len(first) * n
    if n_bytes > LARGEST_ANSWERS_BYTES:
        raise BadInput(
            f"output {name!r} of {n} samples takes {n_bytes} bytes, and {LARGEST_ANSWERS_BYTES} are allowed; "
            "use fewer with --limit"
        )
    return np.empty((n, *first.shape[1:]), first.dtype)


def _estimate(metric: Metric, outputs: Feed, labels: Array) -> Estimate:
    n = len(labels)
    if metric.score is not None:
        scores = metric.score(outputs, labels)
        value = float(scores.mean())
        if np.isin(scores, (0.0, 1.0)).all():
            interval = stats.binomtest(int(scores.sum()), n).proportion_ci(method="wilson")
            return Estimate(value=value, low=float(interval.low), high=float(interval.high), n=n)
        if np.ptp(scores) == 0 or n < 2:
            return Estimate(value=value, low=value, high=value, n=n)
        told = stats.bootstrap(
            (scores,),
            np.mean,
            n_resamples=RESAMPLES,
            method="percentile",
            random_state=0,
            batch=max(1, DRAWN_AT_ONCE // n),
        )
        low, high = (float(end) for end in told.confidence_interval)
        return Estimate(value=value, low=low, high=high, n=n)
    if metric.statistic is None:
        raise BadInput(f"the metric {metric.name!r} has neither a score nor a statistic")
    of = metric.statistic(outputs, labels)
    if not math.isfinite(whole := float(of(np.ones(n)))):
        raise Untrusted(f"{metric.name} of these {n} samples is {whole}: it is not defined for their labels")
    draw = np.random.default_rng(0)
    drawn = [of(draw.multinomial(n, np.full(n, 1 / n)).astype(np.float64)) for _ in range(RESAMPLES)]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return Estimate(value=whole, low=float(low), high=float(high), n=n)
