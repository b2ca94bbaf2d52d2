"""MLPerf's accuracy mode: every sample once over the protocol that load uses, judged by labels."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("grpc", reason="needs the extra 'serve'")

from hasten.cli.app import run as hasten
from hasten.client.client import Client
from hasten.deployment import read_deployment
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import BadInput, InvalidSetting, ServeError, ServerFault, UnknownName, Untrusted
from hasten.load import accuracy
from hasten.load.accuracy import Accuracy, _estimate, measure_accuracy, meets
from hasten.load.target import Protocol, Target
from hasten.measurement import Estimate
from hasten.metrics import load_metric
from hasten.samples import Samples
from hasten.serve.app import Listening, Open
from serve.bundles import bundle
from serve.served import rows_of, served

N, WRONG = 90, 18


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundle(tmp_path_factory.mktemp("accuracy") / "net")


@pytest.fixture(scope="module")
def opened(place: Path) -> Iterator[Open]:
    with served(place, Listening(port=0, grpc_port=0)) as found:
        yield found


@pytest.fixture(scope="module")
def samples(place: Path) -> Samples:
    """Samples that the model's own answers label, but for one in five."""
    _, built = read_deployment(place)
    session = OnnxRuntime().open(built)
    x = rows_of(N)
    scores = session.run({"x": x})["y"]
    session.close()
    labels = scores.argmax(1)
    labels[::5] = (labels[::5] + 1) % scores.shape[1]
    return Samples({"x": x}, labels)


def target_to(protocol: Protocol, opened: Open, place: Path) -> Target:
    url = {"session": str(place), "grpc": f"grpc://{opened.grpc}"}.get(protocol, opened.http)
    return Target(url=url, protocol=protocol, model="net")


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("protocol", ["rest-json", "rest-binary", "grpc", "session"])
def test_every_sample_is_judged_once_over_every_protocol(
    protocol: Protocol, batch: int, opened: Open, place: Path, samples: Samples
) -> None:
    told: list[float | None] = []
    target = target_to(protocol, opened, place)
    found = measure_accuracy(target, samples, batch=batch, progress=lambda text, share: told.append(share))
    assert (found.metric, found.value.value, found.value.n) == ("accuracy", 1 - WRONG / N, N)
    assert 0.70 < found.value.low < found.value.value < found.value.high < 0.88
    assert told[-1] == 1.0
    assert told == sorted(told)


@pytest.mark.parametrize("metric", ["f1", "mse", "auc"])
def test_what_is_no_proportion_has_an_interval_too(metric: str, opened: Open, place: Path, samples: Samples) -> None:
    labels = samples.labels
    assert labels is not None
    one_hot = np.eye(4, dtype=np.float32)[labels]
    asked = replace(samples, labels=one_hot) if metric == "mse" else samples
    try:
        found = measure_accuracy(target_to("rest-binary", opened, place), asked, metric=metric)
    except BadInput as error:
        assert metric == "auc"  # of two classes only
        assert "class" in str(error)
        return
    assert found.value.low < found.value.value < found.value.high


def test_a_metric_that_is_not_defined_for_the_labels_is_no_result() -> None:
    scores = np.random.default_rng(0).uniform(size=(50, 1)).astype(np.float32)
    with pytest.raises(Untrusted, match="auc of these 50 samples is nan"):
        _estimate(load_metric("auc"), {"y": scores}, np.zeros(50, np.int64))


def test_an_interval_takes_no_memory_for_each_draw_of_each_sample() -> None:
    values = np.random.default_rng(0).standard_normal((20_000, 1)).astype(np.float32)
    tracemalloc.start()
    found = _estimate(load_metric("mse"), {"y": values}, values + 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.value == pytest.approx(1.0, rel=1e-3)
    assert peak < 200e6


def test_a_target_quality_is_proven_missed_or_open() -> None:
    def found(low: float, high: float, *, higher: bool = True) -> Accuracy:
        value = Estimate(value=(low + high) / 2, low=low, high=high, n=10)
        return Accuracy(metric="m", higher_is_better=higher, value=value, seconds=1.0)

    assert meets(found(0.91, 0.95), 0.9) == "MEETS"
    assert meets(found(0.85, 0.95), 0.9) == "INCONCLUSIVE"
    assert meets(found(0.80, 0.85), 0.9) == "MISSES"
    assert meets(found(0.80, 0.85, higher=False), 0.9) == "MEETS"
    assert meets(found(0.91, 0.95, higher=False), 0.9) == "MISSES"


def test_without_labels_without_a_protocol_and_with_too_much_to_keep_it_is_refused(
    opened: Open, place: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_to("rest-binary", opened, place)
    with pytest.raises(BadInput, match="name their column with --label"):
        measure_accuracy(target, replace(samples, labels=None))
    with pytest.raises(InvalidSetting, match="cannot be read"):
        measure_accuracy(replace(target, protocol="http"), samples)
    with pytest.raises(InvalidSetting, match="batch is 0"):
        measure_accuracy(target, samples, batch=0)
    nowhere = replace(target, url="http://127.0.0.1:9")
    with pytest.raises(InvalidSetting, match="compares two models"):
        measure_accuracy(nowhere, samples, metric="agreement")
    with pytest.raises(UnknownName, match="nonsense"):
        measure_accuracy(nowhere, samples, metric="nonsense")
    with pytest.raises(ServeError, match=r"sample \d+ of 90 got no good answer: .*nobody"):
        measure_accuracy(replace(target, model="nobody"), samples)
    monkeypatch.setattr(accuracy, "LARGEST_ANSWERS_BYTES", 100)
    with pytest.raises(BadInput, match="use fewer with --limit"):
        measure_accuracy(target, samples)


def test_answers_that_change_their_shape_are_no_answers(
    opened: Open, place: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Client.infer

    def ragged(self: Client, model: str, inputs: Any, **more: Any) -> Any:
        found = real(self, model, inputs, **more)
        first = float(inputs["x"][0, 0]) == float(samples.inputs["x"][3, 0])
        return replace(found, outputs={"y": found.outputs["y"][:, : 2 if first else 4]})

    monkeypatch.setattr(Client, "infer", ragged)
    with pytest.raises(ServerFault, match=r"output 'y' of sample 3 has shape \[1, 2\]"):
        measure_accuracy(target_to("rest-binary", opened, place), samples)


def test_the_command_says_the_metric_and_its_exit_code_the_verdict(
    opened: Open, samples: Samples, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "data.npz", labels=samples.labels, **samples.inputs)
    words = ["load", opened.http, "net", "--data", str(tmp_path / "data.npz"), "--accuracy"]
    assert hasten([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"]["value"]["value"] == pytest.approx(0.8)
    for wanted, code, word in (("0.5", 0, "MEETS"), ("0.8", 4, "INCONCLUSIVE"), ("0.95", 3, "MISSES")):
        assert hasten([*words, "--target-quality", wanted]) == code
        assert word in capsys.readouterr().out
    assert hasten([*words[:-1], "--target-quality", "0.5"]) == 2
    assert "add --accuracy" in capsys.readouterr().err
    assert hasten([*words, "--show-python"]) == 0
    assert "measure_accuracy(target, samples" in capsys.readouterr().out
