"""The server under test: its transports, and what it says of itself and of the model that checks call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import quote

from hasten.conformance.inputs import Spec, Tensor, tensors
from hasten.conformance.wire import Answer, Http, NotMet, status_is, typed
from hasten.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class GrpcAnswer:
    """What a call gave: a message, or the status that it failed with."""

    said: str
    code: int
    """0 is OK."""
    details: str
    message: Any
    """Empty where the call failed."""


class GrpcCalls(Protocol):
    """The server's gRPC side."""

    def call(self, call: str, /, **fields: Any) -> GrpcAnswer:
        """Call ``inference.GRPCInferenceService`` with a message of these fields. Raises NotMet: no answer came."""

    def call_raw(self, method: str, data: bytes, *, streams: bool = False) -> tuple[int, str, bytes]:
        """Call a method by its path with these bytes: the code, the details, the (first) answer. Raises NotMet."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the server's metadata says of a model."""

    name: str
    versions: tuple[str, ...]
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]


@dataclass(frozen=True, kw_only=True)
class Server:
    """What a check is given."""

    http: Http
    model_name: str
    grpc: GrpcCalls | None = None
    assumed: tuple[str, ...] = ()
    """Extensions that are checked though the server does not list them."""
    reload: bool = False
    """Whether checks may unload the model and load it again."""

    @property
    def model_path(self) -> str:
        """The path of the model."""
        return f"/v2/models/{quote(self.model_name, safe='')}"

    def version_path(self, version: str) -> str:
        """Give the path of one version of the model."""
        return f"{self.model_path}/versions/{quote(version, safe='')}"

    @cached_property
    def extensions(self) -> tuple[str, ...]:
        """What the server claims beyond the protocol. Raises NotMet."""
        said = status_is(self.http.get("/v2"), 200).object().get("extensions", [])
        words = [typed(word, str, "an entry of extensions") for word in typed(said, list, "extensions")]
        return (*words, *self.assumed)

    @cached_property
    def model(self) -> Model:
        """The model's metadata. Raises NotMet: it cannot be read."""
        return read_model(status_is(self.http.get(self.model_path), 200))

    @cached_property
    def refusal(self) -> str | None:
        """What a model of text or files says of made-up ones, where it refuses them; else None.

        Such a server does nothing wrong: what an image is, its metadata do not say.
        """
        try:
            if all(spec.datatype != "BYTES" for spec in self.model.inputs):
                return None
            answer = self.infer({"inputs": [tensor.json() for tensor in self.rows()]})
            said = answer.object().get("error") if 400 <= answer.status < 500 else None
        except NotMet:
            return None
        return said if isinstance(said, str) and said else None

    def rows(self, rows: int = 1, *, fill: str = "zeros") -> tuple[Tensor, ...]:
        """Make inputs for the model, by its metadata; see ``inputs.tensors``. Raises NotMet."""
        return tensors(self.model.inputs, rows, fill=fill)

    def infer(self, body: Mapping[str, Any] | bytes, headers: Mapping[str, str] | None = None) -> Answer:
        """Ask the model. Raises NotMet: no answer came."""
        return self.http.post(f"{self.model_path}/infer", body if isinstance(body, bytes) else encoded(body), headers)


def encoded(value: Mapping[str, Any]) -> bytes:
    """Write JSON."""
    return json.dumps(value).encode()


def read_model(answer: Answer) -> Model:
    """Read a model's metadata strictly. Raises NotMet."""
    said = answer.object()
    where = f"of {answer.said}"
    versions = said.get("versions")
    return Model(
        name=typed(said.get("name"), str, f"name {where}"),
        versions=tuple(
            typed(version, str, f"a version {where}") for version in typed(versions or [], list, f"versions {where}")
        ),
        inputs=_specs(said, "inputs", where),
        outputs=_specs(said, "outputs", where),
    )


def _specs(said: Mapping[str, Any], kind: str, where: str) -> tuple[Spec, ...]:
    found = []
    for item in typed(said.get(kind), list, f"{kind} {where}"):
        entry = typed(item, dict, f"an entry of {kind} {where}")
        name = typed(entry.get("name"), str, f"the name of one of the {kind} {where}")
        found.append(
            Spec(
                name=name,
                datatype=typed(entry.get("datatype"), str, f"the datatype of {name!r} {where}"),
                shape=tuple(
                    typed(length, int, f"a length in the shape of {name!r} {where}")
                    for length in typed(entry.get("shape"), list, f"the shape of {name!r} {where}")
                ),
            )
        )
    return tuple(found)


def find_model(http: Http) -> str:
    """Give the first model that the server's index has ready, for who names none.

    Raises:
        BadInput: the server does not answer, or tells none.
    """
    try:
        answer = http.post("/v2/repository/index", b"{}")
        listed = status_is(answer, 200).json()
        names = [
            item["name"]
            for item in typed(listed, list, "the index")
            if isinstance(item, dict) and isinstance(item.get("name"), str) and item.get("state", "READY") == "READY"
        ]
    except NotMet as error:
        raise BadInput(f"the server does not tell its models ({error}); name one: --model NAME") from error
    if not names:
        raise BadInput("the server's index has no model that is ready; name one: --model NAME")
    return str(names[0])
