"""A real small service is analysed: phases that add up, its curve, its limit, its host; and what goes wrong is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hasten.analyse.analysis import analyse_run
from hasten.analyse.costs_worker import measure_costs
from hasten.analyse.highest_rate import Rules
from hasten.analyse.host_samples import read_host
from hasten.analyse.live import Look, Looked, look_at, undisturbed
from hasten.analyse.phases import join_phases
from hasten.cli import app
from hasten.deployment import Serving
from hasten.errors import InvalidSetting
from hasten.load.arrivals import Poisson
from hasten.load.generate import OpenLoad, open_load
from hasten.load.objective import read_objective
from hasten.load.payloads import payloads_of
from hasten.load.record import read_run
from hasten.load.run import LoadRun
from hasten.load.target import Target
from hasten.samples import Samples
from hasten.serve.app import Listening
from load.runs import run_of
from serve.bundles import bundle
from serve.served import served

ROWS = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
LOOK = Look(
    arrivals=Poisson(rate=150),
    duration_s=2.0,
    curve_s=0.4,
    objective=read_objective("p90 <= 500ms"),
    rules=Rules(budget_s=4.0, least_s=0.5, most_s=1.0),
    rates=(50.0,),
)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("analysed")
    path = bundle(folder / "net", serving=Serving(instances=1, batch_sizes=(1, 2, 4), isolation="thread"))
    with served(path, Listening(port=0, grpc_port=None)) as found:
        yield found.http


@pytest.fixture(scope="module")
def load(url: str) -> Iterator[OpenLoad]:
    target = Target(url=url, model="net", connections=64)  # the server's ends of them are in this process as well
    with open_load(target, payloads_of(target, Samples({"x": ROWS}))) as opened:
        yield opened


@pytest.fixture(scope="module")
def looked(load: OpenLoad) -> Looked:
    return look_at(load, LOOK, progress=lambda text, share: None)


def test_the_phases_of_every_request_fit_into_the_clients_wait_within_a_hundredth(looked: Looked) -> None:
    joined = join_phases(looked.run)
    assert {"decode", "queue", "batch_wait", "pre", "infer", "post", "encode"} <= set(joined.told)
    assert joined.unfitting <= 0.01
    assert np.array_equal(joined.response_ns, looked.run.requests.latency_ns[joined.row])


def test_it_tells_the_curve_the_limit_and_the_models_error(looked: Looked) -> None:
    found = looked.analysis
    assert [point.arrivals.split(":")[0] for point in found.curve] == ["poisson"] * 6 + ["closed"]
    assert found.found is not None
    assert found.found.steps
    assert found.capacity is not None
    assert found.capacity.error_saturated is not None
    assert found.capacity.replicas[0][0] == 50.0
    assert {size.rows for size in found.batches} <= {1, 2, 4}


def test_the_servers_host_is_seen_where_it_is_this_one(looked: Looked) -> None:
    assert looked.host is not None
    assert looked.analysis.on_host is not None
    assert looked.analysis.on_host.cores_used is not None
    assert 0 < looked.analysis.on_host.cores_used < 16
    assert any("one host" in note for note in looked.analysis.notes)


def test_the_servers_own_statistics_give_the_same_run_times_as_its_phases(looked: Looked) -> None:
    means = {part.part: part.mean_ns for part in looked.analysis.means}
    infer = join_phases(looked.run).part("infer")
    assert means["compute_infer"] == pytest.approx(float(infer.mean()), rel=0.05)


def test_an_objective_below_the_bare_time_is_refused_at_once(load: OpenLoad) -> None:
    look = Look(objective=read_objective("p99 <= 1us"), duration_s=60.0)
    with pytest.raises(InvalidSetting, match="cannot be met"):
        look_at(load, look, progress=lambda text, share: None)


def test_a_load_whose_generator_was_late_is_repeated_where_an_objective_is_searched() -> None:
    late, good = (run_of([5e6] * 500, late_ns=ns) for ns in (20e6, 0.0))
    objective, asked = read_objective("p99 <= 20ms"), list[int]()

    def measure(seed: int) -> LoadRun:
        asked.append(seed)
        return good if seed == 2 else late

    assert undisturbed(measure, objective) is good
    assert asked == [0, 1, 2]
    assert undisturbed(measure, None) is late
    assert asked == [0, 1, 2, 0], "without an objective the first is as good as any"
    assert undisturbed(lambda seed: late, objective) is late, "it is given up at some time"


def test_t_of_n_is_timed_for_every_size_and_number_of_sessions(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net")
    found = measure_costs(path, {"x": ROWS[:1]}, threads=1, cores=2, sizes=(1, 4), seconds=0.02)
    assert found.sizes == (1, 4)
    assert len(found.busy_ns) == 2
    assert found.ns(4) >= found.ns(1) > 0
    assert np.median(found.residuals) == pytest.approx(1.0, rel=0.2)


def test_the_verb_writes_a_record_that_it_reads_again(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "data.npz", x=ROWS)
    words = ["analyse", url, "net", "--data", str(tmp_path / "data.npz"), "--arrivals", "poisson:rate=100"]
    folder = tmp_path / "out"
    assert app.run([*words, "--duration", "1s", "--no-curve", "-o", str(folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["counts"]["ok"] > 50
    assert {path.name for path in folder.iterdir()} >= {"run.json", "analysis.html", "analysis.md", "analysis.csv"}
    again = analyse_run(read_run(folder), host=read_host(folder))
    assert again.percentiles[0].value_ns == document["percentiles"][0]["value_ns"]
    assert app.run(["analyse", str(folder), "--slo", "p50 <= 10s"]) == 0
    assert app.run(["analyse", str(folder), "--slo", "p50 <= 1us"]) == 4  # no generator is within 5 % of that


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["http://127.0.0.1:9", "net", "--data", "DATA"], "127.0.0.1:9"),
        (["URL", "missing", "--data", "DATA"], "missing"),
        (["URL", "net"], "needs samples"),
        (["URL", "net", "--data", "DATA", "--slo", "fast"], "no objective"),
        (["URL", "net", "--data", "DATA", "--for-rate", "100"], "--slo"),
        (["URL", "net", "--data", "DATA", "--slo", "p99 <= 1us"], "cannot be met"),
        (["URL", "net", "--data", "WIDE"], "x"),
    ],
)
def test_bad_input_is_told_in_one_line(
    words: list[str], said: str, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "data.npz", x=ROWS)
    np.savez(tmp_path / "wide.npz", x=np.zeros((4, 99), np.float32))
    given = {"URL": url, "DATA": str(tmp_path / "data.npz"), "WIDE": str(tmp_path / "wide.npz")}
    assert app.run(["analyse", *(given.get(word, word) for word in words), "--home", str(tmp_path)]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert lines[-1].startswith("hasten: error:")
