"""REST: the extensions that Triton's clients use: statistics, model configuration, repository, schedule policy."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from hasten.conformance.check import Skipped, check
from hasten.conformance.outputs import rest_outputs
from hasten.conformance.rest_health import UNKNOWN
from hasten.conformance.rest_infer import asking, json_rows
from hasten.conformance.server import Server
from hasten.conformance.wire import error_told, met, status_is, typed

STATISTICS, CONFIG = "Statistics", "Model configuration"
REPOSITORY, POLICY = "Repository", "Schedule policy"


def _statistics(server: Server, path: str) -> list[dict[str, Any]]:
    listed = status_is(server.http.get(path), 200).object().get("model_stats")
    return [typed(entry, dict, "an entry of model_stats") for entry in typed(listed, list, "model_stats")]


def _count(entry: dict[str, Any], name: str) -> int:
    return typed(entry.get(name, 0), int, name)


@check(STATISTICS, "Statistics Extension", extension="statistics")
def statistics_of_the_model(server: Server) -> None:
    """GET /v2/models/MODEL/stats lists the model with its counts, and durations as ``{"count", "ns"}``."""
    entries = _statistics(server, f"{server.model_path}/stats")
    met(bool(entries), "model_stats is empty")
    for entry in entries:
        name = typed(entry.get("name"), str, "name")
        met(name == server.model_name, f"model_stats has {name!r}; asked was {server.model_name!r}")
        sums = typed(entry.get("inference_stats"), dict, "inference_stats")
        for word in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
            duration = typed(sums.get(word), dict, f"inference_stats.{word}")
            for part in ("count", "ns"):
                typed(duration.get(part), int, f"inference_stats.{word}.{part}")


@check(STATISTICS, "Statistics Extension", extension="statistics")
def statistics_of_all(server: Server) -> None:
    """GET /v2/models/stats lists every model, this one among them."""
    names = [entry.get("name") for entry in _statistics(server, "/v2/models/stats")]
    met(server.model_name in names, f"model_stats has {names}")


@check(STATISTICS, "Statistics Extension: inference_count", extension="statistics")
def statistics_count_rows(server: Server) -> None:
    """An inference is counted: ``inference_count`` by its rows, ``success`` by one."""
    first = [spec.shape[0] if spec.shape else 0 for spec in server.model.inputs]
    rows = 2 if first and all(length == -1 for length in first) else 1
    tensors = json_rows(server, rows)
    path = f"{server.model_path}/stats"

    def counted() -> tuple[int, int]:
        entries = _statistics(server, path)
        sums = [typed(entry.get("inference_stats"), dict, "inference_stats").get("success") for entry in entries]
        done = sum(_count(typed(one, dict, "inference_stats.success"), "count") for one in sums)
        return sum(_count(entry, "inference_count") for entry in entries), done

    before = counted()
    rest_outputs(server.infer(asking(tensors)), server.model)
    after = counted()
    met(
        after[0] >= before[0] + rows,
        f"inference_count is {after[0]} after an inference of {rows} rows and was {before[0]} before",
    )
    met(after[1] > before[1], f"success.count is {after[1]} after an inference and was {before[1]} before")


@check(STATISTICS, "Statistics Extension", extension="statistics")
def statistics_of_an_unknown_model(server: Server) -> None:
    """The statistics of a model that the server does not have are an error that is told."""
    error_told(server.http.get(f"/v2/models/{UNKNOWN}/stats"))


@check(CONFIG, "Model Configuration Extension", extension="model_configuration")
def config_of_the_model(server: Server) -> None:
    """GET /v2/models/MODEL/config gives ``name``, ``max_batch_size``, and the metadata's inputs and outputs."""
    said = status_is(server.http.get(f"{server.model_path}/config"), 200).object()
    name = typed(said.get("name"), str, "name")
    met(name == server.model_name, f"name is {name!r}; asked was {server.model_name!r}")
    met(typed(said.get("max_batch_size", 0), int, "max_batch_size") >= 0, "max_batch_size is negative")
    for key, specs in (("input", server.model.inputs), ("output", server.model.outputs)):
        entries = [typed(entry, dict, f"an entry of {key}") for entry in typed(said.get(key), list, key)]
        names = sorted(typed(entry.get("name"), str, f"the name of an entry of {key}") for entry in entries)
        met(names == sorted(spec.name for spec in specs), f"{key} has {names}; the metadata differ")
        for entry in entries:
            kind = typed(entry.get("data_type"), str, f"data_type of {entry['name']!r}")
            met(kind.startswith("TYPE_"), f"data_type of {entry['name']!r} is {kind!r}, not TYPE_...")


@check(CONFIG, "Model Configuration Extension", extension="model_configuration")
def config_of_an_unknown_model(server: Server) -> None:
    """The configuration of a model that the server does not have is an error that is told."""
    error_told(server.http.get(f"/v2/models/{UNKNOWN}/config"))


@check(REPOSITORY, "Model Repository Extension: Index", extension="model_repository")
def repository_index(server: Server) -> None:
    """POST /v2/repository/index lists models with ``name``, and ``state`` READY for this one."""
    entries = typed(status_is(server.http.post("/v2/repository/index", b"{}"), 200).json(), list, "the index")
    states = [
        typed(entry, dict, "an entry of the index").get("state", "READY")
        for entry in entries
        if isinstance(entry, dict) and entry.get("name") == server.model_name
    ]
    met("READY" in states, f"the index has {server.model_name!r} with the states {states}")


@check(REPOSITORY, "Model Repository Extension: Index", extension="model_repository")
def repository_index_of_what_is_ready(server: Server) -> None:
    """With ``"ready": true`` the index lists only what is ready."""
    answer = status_is(server.http.post("/v2/repository/index", b'{"ready": true}'), 200)
    for entry in typed(answer.json(), list, "the index"):
        state = typed(entry, dict, "an entry of the index").get("state", "READY")
        met(state == "READY", f"the index of what is ready has {str(entry)[:80]}")


@check(REPOSITORY, "Model Repository Extension: Load", extension="model_repository")
def repository_load_of_an_unknown_model(server: Server) -> None:
    """Loading a model that the repository does not have is an error that is told."""
    error_told(server.http.post(f"/v2/repository/models/{UNKNOWN}/load", b"{}"))


@check(REPOSITORY, "Model Repository Extension: Load, Unload", extension="model_repository")
def repository_unload_and_load(server: Server) -> None:
    """An unloaded model is not ready and answers with an error; loaded again, it is as before."""
    if not server.reload:
        raise Skipped("it would take the model away from others for a moment; --reload allows it")
    path = f"/v2/repository/models/{quote(server.model_name, safe='')}"
    try:
        status_is(server.http.post(f"{path}/unload", b"{}"), 200)
        answer = server.http.get(f"{server.model_path}/ready")
        said_ready = answer.status == 200 and answer.object().get("ready") is not False
        met(not said_ready, "the model is ready after it was unloaded")
    finally:
        loaded = server.http.post(f"{path}/load", b"{}")
    status_is(loaded, 200)
    status_is(server.http.get(f"{server.model_path}/ready"), 200)


@check(POLICY, "Schedule Policy Extension", extension="schedule_policy")
def policy_is_taken(server: Server) -> None:
    """A request with ``priority`` and a ``timeout`` of a minute is answered."""
    more = {"priority": 1, "timeout": 60_000_000}
    rest_outputs(server.infer(asking(json_rows(server), parameters=more)), server.model)


@check(POLICY, "Schedule Policy Extension: timeout", extension="schedule_policy")
def policy_of_a_microsecond(server: Server) -> None:
    """A request with a ``timeout`` of one microsecond is answered, or its error is told; it never hangs."""
    answer = server.infer(asking(json_rows(server), parameters={"timeout": 1}))
    if answer.status != 200:
        error_told(answer)
        met(answer.status != 500, f"{answer.said} answered 500, as if it were a fault of the server")


@check(POLICY, "Schedule Policy Extension: priority", extension="schedule_policy")
def policy_that_is_no_number(server: Server) -> None:
    """A ``priority`` that is no number is an error that is told."""
    error_told(server.infer(asking(json_rows(server), parameters={"priority": "soon"})))
