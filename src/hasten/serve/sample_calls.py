"""Lines that call a model when they are pasted into a shell: made from its signature, with small valid data."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from hasten.protocol.messages import ITEM_BYTES, ModelMetadata, TensorMetadata

WRITTEN_VALUES = 64
"""Up to so many values are written out in JSON."""

KEY_VARIABLE = "HASTEN_KEY"
"""The shell variable that the lines take an API key from."""

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
"""A gray image of one pixel, a PNG file in base64."""

WITHOUT_JSON = ("FP16", "BF16")


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Where a model is, and what a call of it must bring."""

    url: str
    with_key: bool = False
    certificate: str | None = None
    """The file of a certificate to trust."""
    takes_image: bool = False
    """The model's only input is the file of an image."""


def curl_line(caller: Caller, model: ModelMetadata) -> str | None:
    """Give a curl command; None where its inputs fit neither short JSON nor one raw tensor."""
    words = ["curl", "-s", _infer_url(caller, model)]
    if caller.certificate is not None:
        words += ["--cacert", caller.certificate]
    rest = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if caller.with_key else ""
    if caller.takes_image:
        words += ["-H", "Inference-Header-Content-Length: 0", "--data-binary", "@-"]
        return f"echo {PIXEL} | base64 -d | {shlex.join(words)}{rest} | tr -cd '[:print:]'"
    if _short(model.inputs):
        body = json.dumps({"inputs": [_written(spec) for spec in model.inputs]})
        return f"{shlex.join([*words, '-d', body])}{rest}"
    if len(model.inputs) == 1 and model.inputs[0].datatype in ITEM_BYTES:
        words += ["-H", "Inference-Header-Content-Length: 0", "--data-binary", "@-", "-o", "answer.bin"]
        return f"head -c {_bytes(model.inputs[0])} /dev/zero | {shlex.join(words)}{rest}"
    return None


def python_line(caller: Caller, model: ModelMetadata) -> str:
    """Give a command that calls the model by Python's standard library alone."""
    imports, headers, more = ["json", "urllib.request as u"], "", ""
    if caller.with_key:
        imports.append("os")
        headers = f"'Authorization': 'Bearer ' + os.environ['{KEY_VARIABLE}']"
    if caller.certificate is not None:
        imports.append("ssl")
        more = f", context=ssl.create_default_context(cafile={caller.certificate!r})"
    head = "{'inputs': [" + ", ".join(_python(spec) for spec in model.inputs) + "]}"
    lines = [f"import {', '.join(imports)}", f"body = json.dumps({head}).encode()"]
    if caller.takes_image:
        headers = ", ".join(filter(None, [headers, "'Inference-Header-Content-Length': '0'"]))
        lines = [f"import {', '.join(imports)}, base64", f"body = base64.b64decode({PIXEL!r})"]
    if any(spec.datatype in WITHOUT_JSON for spec in model.inputs):
        headers = ", ".join(filter(None, [headers, "'Inference-Header-Content-Length': str(len(body))"]))
        total = sum(_bytes(spec) for spec in model.inputs if spec.datatype in WITHOUT_JSON)
        lines.append(f"request = u.Request({_infer_url(caller, model)!r}, body + bytes({total}), {{{headers}}})")
    else:
        lines.append(f"request = u.Request({_infer_url(caller, model)!r}, body, {{{headers}}})")
    lines.append(f"print(u.urlopen(request{more}).read()[:2000])")
    return f"python3 -c {shlex.quote('; '.join(lines))}"


def _infer_url(caller: Caller, model: ModelMetadata) -> str:
    return f"{caller.url}/v2/models/{quote(model.name, safe='')}/infer"


def _shape(spec: TensorMetadata) -> list[int]:
    return [max(length, 1) for length in spec.shape]


def _bytes(spec: TensorMetadata) -> int:
    return math.prod(_shape(spec)) * ITEM_BYTES[spec.datatype]


def _short(inputs: Sequence[TensorMetadata]) -> bool:
    values = sum(math.prod(_shape(spec)) for spec in inputs)
    return values <= WRITTEN_VALUES and not any(spec.datatype in WITHOUT_JSON for spec in inputs)


def _value(spec: TensorMetadata) -> bool | int | str:
    special: dict[str, bool | str] = {"BOOL": False, "BYTES": "text"}
    return special.get(spec.datatype, 0)


def _written(spec: TensorMetadata) -> dict[str, object]:
    shape = _shape(spec)
    data = [_value(spec)] * math.prod(shape)
    return {"name": spec.name, "shape": shape, "datatype": spec.datatype, "data": data}


def _python(spec: TensorMetadata) -> str:
    shape = _shape(spec)
    named = f"'name': {spec.name!r}, 'shape': {shape}, 'datatype': {spec.datatype!r}"
    if spec.datatype in WITHOUT_JSON:
        return f"{{{named}, 'parameters': {{'binary_data_size': {_bytes(spec)}}}}}"
    return f"{{{named}, 'data': [{_value(spec)!r}] * {math.prod(shape)}}}"
