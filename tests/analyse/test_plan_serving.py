"""How to serve is chosen for an objective, measured on a real server, and written as a deployment that serves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hasten import registry
from hasten.analyse.batch_costs import BatchCosts
from hasten.analyse.costs_worker import cores_for, sizes_for, threads_for
from hasten.analyse.highest_rate import Rules
from hasten.analyse.plan_serving import Option, ServingPlan, Wanted, in_server, plan_serving, read_candidate
from hasten.analyse.served import served
from hasten.cli import app
from hasten.cli.plan_serving import write_plan
from hasten.client.client import Client
from hasten.deployment import Serving, read_deployment
from hasten.engines.onnxruntime import OnnxRuntime
from hasten.errors import BadInput, InvalidSetting
from hasten.golden import GOLDEN, Golden, write_golden
from hasten.load.objective import read_objective
from hasten.samples import Samples
from hasten.serve.reading import read_bundle
from hasten.serve.repository import open_repository
from hasten.steps.bundle_files import files_beside
from hasten.testing.models import convnet
from serve.bundles import bundle
from serve.photos import CLASSES, POST, PRE, SIZE

ROWS = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)


def silent(text: str, share: float | None) -> None:
    """Take what is told of progress."""


def costs(each_ns: float, **more: float) -> BatchCosts:
    return BatchCosts(
        sizes=(1, 2), busy_ns=((each_ns, 1.5 * each_ns),), residuals=np.ones(1), outside_ns=np.ones(1), **more
    )


def test_runs_take_longer_in_a_server_by_the_share_that_was_seen() -> None:
    found = in_server(costs(4e6), timed=costs(1e6), seen=costs(1.2e6, loop_ns=5.0, between_ns=7.0))
    assert found.ns(1) == pytest.approx(4.8e6)
    assert found.loop_ns == 5.0
    assert found.between_ns == 7.0


def test_threads_are_powers_of_two_within_the_cores(tmp_path: Path) -> None:
    deployment, _ = read_deployment(bundle(tmp_path / "net"))
    assert threads_for(deployment, 6) == (1, 2, 4, 6)
    assert threads_for(deployment, 1) == (1,)


def test_on_a_gpu_threads_make_no_difference_and_few_sessions_are_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._registered["engine"], "elsewhere", registry.Entry("serve.test_gpu:Elsewhere"))
    here, _ = read_deployment(bundle(tmp_path / "net"))
    there, _ = read_deployment(bundle(tmp_path / "there", engine="elsewhere"))
    assert (cores_for(here, 16), cores_for(there, 16), cores_for(there, 2)) == (16, 3, 2)
    assert threads_for(there, 16) == (1,)


def test_a_model_of_a_fixed_batch_has_one_size(tmp_path: Path) -> None:
    path = bundle(tmp_path / "net", batch=4)
    deployment, _ = read_deployment(path)
    assert sizes_for(deployment, path, (1, 2, 4, 8)) == (4,)


def test_an_objective_below_a_single_run_is_refused_before_any_server_is_up(tmp_path: Path) -> None:
    candidate = read_candidate(bundle(tmp_path / "net"), lambda artifact: Samples({"x": ROWS}))
    with pytest.raises(InvalidSetting, match="cannot be met"):
        plan_serving([candidate], Wanted(objective=read_objective("p99 <= 1us"), sizes=(1,)), progress=silent)


def test_planning_for_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="no deployment"):
        plan_serving([], Wanted(objective=read_objective("p99 <= 1s")), progress=silent)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [False, True])
def test_the_best_way_is_measured_with_the_models_error_beside_it(tmp_path: Path, steps: bool) -> None:
    """What is planned for is the model: clients of one with steps send files, and its samples are what it takes."""
    x = ROWS
    path = bundle(tmp_path / "net")
    if steps:
        path = bundle(tmp_path / "photos", model=convnet(size=SIZE), pre=PRE, post=POST, classes=list(CLASSES))
        x = np.random.default_rng(0).standard_normal((8, 3, SIZE, SIZE)).astype(np.float32)
    candidate = read_candidate(path, lambda artifact: Samples({"x": x}))
    wanted = Wanted(
        objective=read_objective("p90 <= 900ms"),
        rate=100.0,
        sizes=(1, 2),
        rules=Rules(budget_s=3.0, least_s=0.5, most_s=1.0),
        measured=1,
    )
    found = plan_serving([candidate], wanted, progress=silent)
    assert found.chosen.found is not None
    assert found.chosen.found.steps
    assert found.serving.instances == found.chosen.instances == 1
    assert found.serving.batch_sizes == found.chosen.sizes
    assert found.settings["threads"] == 1
    assert found.replicas is not None
    assert [line.startswith("the steps of") for line in found.left_out] == [True] * steps


def labelled(folder: Path) -> Path:
    """Write a bundle whose step reads names from a file, with golden answers."""
    best = {"step": "top-k", "input": "y", "labels": "names/labels.txt"}
    path = bundle(folder, post=(best,))
    _, artifact = read_deployment(path)
    answers = OnnxRuntime().open(artifact).run({"x": ROWS[:2]})
    write_golden(folder, Golden({"x": ROWS[:2]}, answers))
    (folder / "names").mkdir()
    (folder / "names" / "labels.txt").write_text("".join(f"class {k}\n" for k in range(answers["y"].shape[1])))
    return path


def planned(path: Path) -> ServingPlan:
    """Plan to serve a bundle as it is."""
    option = Option(path=str(path), engine="onnxruntime", threads=1, instances=1, sizes=(1, 2), predicted=1.0)
    return ServingPlan(
        objective=read_objective("p90 <= 900ms"),
        chosen=option,
        serving=Serving(instances=1, batch_sizes=(1, 2)),
        settings={"threads": 1},
        options=(option,),
        replicas=None,
        left_out=(),
    )


def test_the_chosen_bundle_has_golden_answers_and_the_files_of_its_steps(tmp_path: Path) -> None:
    path = write_plan(planned(labelled(tmp_path / "net")), tmp_path / "chosen")
    found = read_bundle(open_repository(path).find("net"))
    assert found.golden is not None
    assert found.pipeline is not None
    assert (path.parent / GOLDEN).read_bytes() == (tmp_path / "net" / GOLDEN).read_bytes()


def test_a_bundle_whose_steps_read_files_is_served_with_them(tmp_path: Path) -> None:
    path = labelled(tmp_path / "net")
    deployment, artifact = read_deployment(path)
    files = files_beside(path, deployment)
    with served(deployment, artifact, serving=deployment.serving, files=files) as url, Client(url) as client:
        label = client.infer("net", {"x": ROWS[:1]}).outputs["label"]
    assert label.item().startswith(b"class ")


def test_files_that_no_step_reads_or_that_lie_elsewhere_are_not_passed_on(tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("one\n")
    outside = ({"step": "top-k", "input": "y", "labels": "../outside.txt"},)
    path = bundle(tmp_path / "net", post=outside)
    (tmp_path / "net" / "notes.txt").write_text("mine")
    assert files_beside(path, read_deployment(path)[0]) == {}


def test_a_chosen_bundle_replaces_the_one_that_was_chosen_before(tmp_path: Path) -> None:
    found = planned(labelled(tmp_path / "net"))
    for _ in range(2):
        write_plan(found, tmp_path / "chosen")
    assert read_deployment(tmp_path / "chosen" / "deployment.toml")[0].serving == found.serving


@pytest.mark.parametrize("holds", ["notes.txt", "2/deployment.toml", "model/mine.onnx", "empty/"])
def test_a_bundle_with_something_else_in_its_folder_is_not_replaced(tmp_path: Path, holds: str) -> None:
    found = planned(bundle(tmp_path / "net"))
    other = labelled(tmp_path / "models")
    place = other.parent / holds
    if holds.endswith("/"):
        place.mkdir()
    else:
        place.parent.mkdir(exist_ok=True)
        place.write_text("mine")
    with pytest.raises(BadInput, match="would be lost"):
        write_plan(found, other.parent)
    assert place.exists()


def test_the_verb_refuses_a_folder_of_other_things_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, other = bundle(tmp_path / "net"), bundle(tmp_path / "models" / "other")
    words = ["plan-serving", str(path), "--data", "missing.npz", "--slo", "p99 <= 1s", "-o", str(tmp_path / "models")]
    assert app.run(words) == 1
    assert "models is there already and is no bundle" in capsys.readouterr().err
    assert read_deployment(other)


@pytest.mark.slow
def test_the_verb_writes_a_bundle_that_can_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "data.npz", x=ROWS)
    path = labelled(tmp_path / "net")
    words = ["plan-serving", str(path), "--data", str(tmp_path / "data.npz"), "--slo", "p90 <= 900ms", "--cores", "1"]
    limits = ["--batch-sizes", "1,2", "--search", "2s", "--measured", "1"]
    assert app.run([*words, *limits, "-o", str(tmp_path / "chosen"), "--json"]) in (0, 3)
    document = json.loads(capsys.readouterr().out)
    deployment = read_bundle(open_repository(tmp_path / "chosen").find("net")).deployment
    assert deployment.serving.instances == document["serving"]["instances"]
    assert list(deployment.serving.batch_sizes) == document["serving"]["batch_sizes"]


def test_the_chosen_bundle_may_not_replace_a_compared_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle(tmp_path / "net")
    words = ["plan-serving", str(path), "--data", "x.npz", "--slo", "p99 <= 1s", "-o", str(tmp_path / "net")]
    assert app.run(words) == 1
    assert "another folder" in capsys.readouterr().err
