"""The REST side described: one table of calls, as an OpenAPI document and as a page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

MODEL, VERSION = "/v2/models/{model}", "/versions/{version}"


@dataclass(frozen=True)
class Call:
    """A call: its verb, its paths, what it does, and what a good answer holds."""

    verb: str
    paths: tuple[str, ...]
    does: str
    gives: str = "application/json"
    body: bool = False


def _both(rest: str) -> tuple[str, ...]:
    return (f"{MODEL}{rest}", f"{MODEL}{VERSION}{rest}")


CALLS: dict[str, Call] = {
    "live": Call("GET", ("/v2/health/live",), "Whether the process works."),
    "ready": Call("GET", ("/v2/health/ready",), "Whether every model is ready and the server is not draining."),
    "server": Call("GET", ("/v2",), "The server's name, version and extensions."),
    "model": Call("GET", _both(""), "A model's inputs, outputs and versions."),
    "model_ready": Call("GET", _both("/ready"), "Whether a model is ready."),
    "infer": Call("POST", _both("/infer"), "Run a model: JSON, or JSON followed by binary tensors.", body=True),
    "config": Call("GET", _both("/config"), "A model's configuration, as Triton's clients read it."),
    "stats": Call("GET", ("/v2/models/stats", *_both("/stats")), "Counts and times of a model, or of all."),
    "index": Call("POST", ("/v2/repository/index",), "The models and versions of the repository.", body=True),
    "load": Call(
        "POST",
        ("/v2/repository/models/{model}/load",),
        "Load a model's newest version, or parameters.version.",
        body=True,
    ),
    "unload": Call("POST", ("/v2/repository/models/{model}/unload",), "Unload a model.", body=True),
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
            "schemas": {"Error": _object({"error": {"type": "string"}}), "Tensor": _TENSOR, "Infer": _INFER},
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
            {"name": part, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for part in ("model", "version")
            if f"{{{part}}}" in path
        ],
        "responses": {
            "200": {"description": "Done.", "content": {call.gives: {}}},
            **{code: {"description": text, "content": _json("Error")} for code, text in ERRORS.items()},
        },
    }
    if call.body:
        schema = _json("Infer") if path.endswith("/infer") else {"application/json": {"schema": {"type": "object"}}}
        found["requestBody"] = {"required": path.endswith("/infer"), "content": schema}
    return found


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "datatype": {"type": "string"},
        "parameters": {"type": "object"},
        "data": {"type": "array"},
    },
}
_INFER = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {"type": "object"},
        "inputs": {"type": "array", "items": {"$ref": "#/components/schemas/Tensor"}},
        "outputs": {"type": "array", "items": {"type": "object", "required": ["name"]}},
    },
}
