"""The REST side described: one table of calls, as an OpenAPI document and as a page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

from hasten.protocol.messages import DATATYPES

NAME_PATTERN = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
"""What models and versions are called."""

MEMORY, REGION = "/v2/systemsharedmemory", "/v2/systemsharedmemory/region/{region}"
MODEL, VERSION = "/v2/models/{model}", "/versions/{version}"


@dataclass(frozen=True)
class Call:
    """A call: its verb, its paths, what it does, and what a good answer holds."""

    verb: str
    paths: tuple[str, ...]
    does: str
    gives: str = "application/json"
    body: str | None = None
    """Its body's schema; None: it takes none."""


def _both(rest: str) -> tuple[str, ...]:
    return (f"{MODEL}{rest}", f"{MODEL}{VERSION}{rest}")


CALLS: dict[str, Call] = {
    "live": Call("GET", ("/v2/health/live",), "Whether the process works."),
    "ready": Call("GET", ("/v2/health/ready",), "Whether every model is ready and the server is not draining."),
    "server": Call("GET", ("/v2",), "The server's name, version and extensions."),
    "model": Call("GET", _both(""), "A model's inputs, outputs and versions."),
    "model_ready": Call("GET", _both("/ready"), "Whether a model is ready."),
    "infer": Call("POST", _both("/infer"), "Run a model: JSON, or JSON followed by binary tensors.", body="Infer"),
    "config": Call("GET", _both("/config"), "A model's configuration, as Triton's clients read it."),
    "stats": Call("GET", ("/v2/models/stats", *_both("/stats")), "Counts and times of a model, or of all."),
    "index": Call("POST", ("/v2/repository/index",), "The models and versions of the repository.", body="Index"),
    "load": Call(
        "POST", ("/v2/repository/models/{model}/load",), "Load a model's newest version, or that named.", body="Load"
    ),
    "unload": Call("POST", ("/v2/repository/models/{model}/unload",), "Unload a model.", body="Unload"),
    "memory_status": Call("GET", (f"{MEMORY}/status", f"{REGION}/status"), "The registered regions of shared memory."),
    "memory_register": Call(
        "POST", (f"{REGION}/register",), "Register shared memory, where the server allows it.", body="Region"
    ),
    "memory_unregister": Call("POST", (f"{MEMORY}/unregister", f"{REGION}/unregister"), "Forget a region, or all."),
    "metrics": Call("GET", ("/metrics",), "Metrics in Prometheus' text format.", "text/plain"),
    "openapi": Call("GET", ("/openapi.json",), "This description, for machines."),
    "docs": Call("GET", ("/docs",), "This description, for people.", "text/html"),
}
"""Every call of the REST side, by the name that its route has."""

ERRORS = {
    "400": "The request is malformed, or does not fit the model.",
    "401": "The API key is missing or wrong.",
    "404": "No such path, model or version.",
    "413": "The body is over the limit.",
    "503": "Not ready, or too busy; Retry-After says when to come again.",
    "504": "The request's own time limit was over.",
}


def document(version: str) -> dict[str, Any]:
    """Give the OpenAPI document."""
    paths: dict[str, Any] = {}
    for name, call in CALLS.items():
        for place, path in enumerate(call.paths):
            paths.setdefault(path, {})[call.verb.lower()] = _operation(f"{name}{place or ''}", path, call)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hasten",
            "version": version,
            "description": "The Open Inference Protocol, with binary tensors and the extensions of Triton's clients.",
        },
        "paths": paths,
        "components": {
            "schemas": {"Error": _object({"error": {"type": "string"}}), "Tensor": _TENSOR, "Infer": _INFER, **_BODIES},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def page(version: str) -> bytes:
    """Give the page that lists every call."""
    rows = "".join(
        f"<tr><td>{call.verb}</td><td>{'<br>'.join(f'<code>{html.escape(path)}</code>' for path in call.paths)}</td>"
        f"<td>{html.escape(call.does)}</td></tr>"
        for call in CALLS.values()
    )
    errors = "".join(f"<tr><td>{code}</td><td>{html.escape(text)}</td></tr>" for code, text in ERRORS.items())
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<title>hasten: calls</title><style>body{font:16px/1.5 system-ui;margin:2rem auto;max-width:60rem}"
        "td{padding:.3rem .8rem;vertical-align:top;border-top:1px solid #8884}</style>"
        f"<h1>hasten {html.escape(version)}</h1><p>The Open Inference Protocol over HTTP. "
        f"<a href=openapi.json>openapi.json</a></p><table>{rows}</table><h2>Errors</h2><table>{errors}</table></html>"
    ).encode()


def _operation(name: str, path: str, call: Call) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": name,
        "summary": call.does,
        "parameters": [
            {"name": part, "in": "path", "required": True, "schema": {"type": "string", "pattern": NAME_PATTERN}}
            for part in ("model", "version", "region")
            if f"{{{part}}}" in path
        ],
        "responses": {
            "200": {"description": "Done.", "content": {call.gives: {}}},
            **{code: {"description": text, "content": _json("Error")} for code, text in ERRORS.items()},
        },
    }
    if call.body:
        found["requestBody"] = {"required": call.body == "Infer", "content": _json(call.body)}
    return found


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


_PARAMETERS = {"type": "object", "additionalProperties": {"type": ["boolean", "integer", "number", "string"]}}
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"type": "string", "enum": [*DATATYPES]},
        "parameters": _PARAMETERS,
        "data": {"type": "array"},
    },
}
_INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": {"type": "string"}, "parameters": _PARAMETERS},
            },
        },
    },
}


def _closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


_BYTES = {"type": "integer", "minimum": 0}
_BODIES = {
    "Index": _closed(ready={"type": "boolean"}),
    "Load": _closed(parameters=_closed(version={"type": ["string", "null"]})),
    "Region": {
        **_closed(key={"type": "string"}, offset=_BYTES, byte_size=_BYTES),
        "required": ["key", "byte_size"],
    },
    "Unload": _closed(parameters=_closed(unload_dependents={"type": "boolean"})),
}
"""The bodies of the repository's calls; what they do not know is refused."""
