"""REST: health, and what the server says of itself and of its model."""

from __future__ import annotations

from hasten.conformance.check import Skipped, check
from hasten.conformance.inputs import DATATYPES
from hasten.conformance.server import Server, read_model
from hasten.conformance.wire import error_told, met, status_is, typed

HEALTH, METADATA = "REST health", "REST metadata"
UNKNOWN = "no-model-is-called-this"


@check(HEALTH, "Server Live")
def rest_server_live(server: Server) -> None:
    """GET /v2/health/live answers 200."""
    status_is(server.http.get("/v2/health/live"), 200)


@check(HEALTH, "Server Live Response JSON Object")
def rest_server_live_body(server: Server) -> None:
    """The answer to "live" is a JSON object with ``"live": true``."""
    live = typed(server.http.get("/v2/health/live").object().get("live"), bool, "live")
    met(live, "live is false, and the server answers")


@check(HEALTH, "Server Ready")
def rest_server_ready(server: Server) -> None:
    """GET /v2/health/ready answers 200 while every model is ready."""
    status_is(server.http.get("/v2/health/ready"), 200)


@check(HEALTH, "Server Ready Response JSON Object")
def rest_server_ready_body(server: Server) -> None:
    """The answer to "ready" is a JSON object with ``"live": true`` (as the text has it) or ``"ready": true``."""
    said = server.http.get("/v2/health/ready").object()
    met(
        said.get("live") is True or said.get("ready") is True,
        f"the body of GET /v2/health/ready has neither live nor ready as true: {said}",
    )


@check(HEALTH, "Model Ready")
def rest_model_ready(server: Server) -> None:
    """GET /v2/models/MODEL/ready answers 200 for a model that is ready."""
    status_is(server.http.get(f"{server.model_path}/ready"), 200)


@check(HEALTH, "Model Ready Response JSON Object")
def rest_model_ready_body(server: Server) -> None:
    """The answer to a model's "ready" is a JSON object with its ``name`` and ``"ready": true``."""
    said = server.http.get(f"{server.model_path}/ready").object()
    name = typed(said.get("name"), str, "name")
    met(name == server.model_name, f"name is {name!r}; asked was {server.model_name!r}")
    met(typed(said.get("ready"), bool, "ready"), "ready is false, and the status is that of a ready model")


@check(HEALTH, "Model Ready")
def rest_unknown_model_is_not_ready(server: Server) -> None:
    """A model that the server does not have is not said to be ready."""
    answer = server.http.get(f"/v2/models/{UNKNOWN}/ready")
    if answer.status == 200:
        met(answer.object().get("ready") is False, f"{answer.said} answered 200, and not that it is not ready")


@check(HEALTH, "Error codes, by choice: 404", level="recommended")
def rest_unknown_model_is_not_ready_404(server: Server) -> None:
    """Asking for the readiness of a model that the server does not have answers 404."""
    status_is(server.http.get(f"/v2/models/{UNKNOWN}/ready"), 404)


@check(METADATA, "Server Metadata Response JSON Object")
def rest_server_metadata(server: Server) -> None:
    """GET /v2 answers 200 with ``name`` and ``version`` as text and ``extensions`` as a list of texts."""
    said = status_is(server.http.get("/v2"), 200).object()
    typed(said.get("name"), str, "name")
    typed(said.get("version"), str, "version")
    for word in typed(said.get("extensions"), list, "extensions"):
        typed(word, str, "an entry of extensions")


@check(METADATA, "Triton's clients call it so", level="recommended")
def rest_server_metadata_with_a_slash(server: Server) -> None:
    """GET /v2/ is GET /v2."""
    status_is(server.http.get("/v2/"), 200)


@check(METADATA, "Model Metadata Response JSON Object")
def rest_model_metadata(server: Server) -> None:
    """GET /v2/models/MODEL answers 200 with ``name``, ``platform``, ``inputs`` and ``outputs``, each of its type."""
    answer = status_is(server.http.get(server.model_path), 200)
    model = read_model(answer)
    met(model.name == server.model_name, f"name is {model.name!r}; asked was {server.model_name!r}")
    typed(answer.object().get("platform"), str, "platform")


@check(METADATA, "Tensor Data Types")
def rest_model_metadata_tensors(server: Server) -> None:
    """Every tensor of the metadata has a known datatype, and lengths from 0 or -1; there is one of each kind."""
    model = server.model
    for spec in (*model.inputs, *model.outputs):
        met(spec.datatype in DATATYPES, f"{spec.name!r} has the datatype {spec.datatype!r}")
        met(all(length >= -1 for length in spec.shape), f"{spec.name!r} has the shape {list(spec.shape)}")
    met(bool(model.inputs), "the metadata has no inputs, so that nobody can tell what to send")
    met(bool(model.outputs), "the metadata has no outputs")


@check(METADATA, "Model Metadata Response JSON Object: versions")
def rest_model_metadata_of_a_version(server: Server) -> None:
    """Every version that the metadata lists can be asked for by its path."""
    for version in versions_of(server):
        status_is(server.http.get(server.version_path(version)), 200)


@check(METADATA, "Model Metadata Response JSON Error Object")
def rest_unknown_model_metadata(server: Server) -> None:
    """The metadata of a model that the server does not have is an error status with ``{"error": text}``."""
    error_told(server.http.get(f"/v2/models/{UNKNOWN}"))


@check(METADATA, "Error codes, by choice: 404", level="recommended")
def rest_unknown_model_metadata_404(server: Server) -> None:
    """The metadata of a model that the server does not have is a 404."""
    status_is(server.http.get(f"/v2/models/{UNKNOWN}"), 404)


@check(METADATA, "Model Metadata Response JSON Error Object")
def rest_unknown_version_metadata(server: Server) -> None:
    """The metadata of a version that the model does not have is an error status with ``{"error": text}``."""
    versions_of(server)
    error_told(server.http.get(server.version_path("987654321")))


@check("REST", "Error codes, by choice: 404", level="recommended")
def rest_unknown_path(server: Server) -> None:
    """A path that does not exist is a 404 with ``{"error": text}``."""
    answer = status_is(server.http.get("/v2/no/such/path"), 404)
    error_told(answer)


@check("REST", "Error codes, by choice: 405", level="recommended")
def rest_wrong_verb(server: Server) -> None:
    """A GET where a POST is wanted is a 405."""
    status_is(server.http.get(f"{server.model_path}/infer"), 405)


@check("REST", "RFC 9112, 9.3", level="recommended")
def rest_connections_are_kept(server: Server) -> None:
    """A connection takes a second request after the first."""
    asked = ("GET", "/v2/health/live", None, dict[str, str]())
    for answer in server.http.send_all([asked, asked], keep=True):
        status_is(answer, 200)


def versions_of(server: Server) -> tuple[str, ...]:
    """Give the versions that can be asked for. Raises Skipped: the server tells none, which it may."""
    if not server.model.versions:
        raise Skipped("the metadata lists no versions; a server need not have any")
    return server.model.versions
