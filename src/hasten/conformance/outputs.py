"""Reads the outputs of an answer, and checks them against the model's metadata."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hasten.conformance.inputs import Spec, Tensor, fits, flat, unpacked
from hasten.conformance.server import Model
from hasten.conformance.wire import Answer, met, parsed, shown, status_is, typed

HEADER = "inference-header-content-length"


def rest_outputs(answer: Answer, model: Model, *, asked: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Read the outputs of a REST answer, JSON or with bytes behind it; ``asked``: these and no others.

    Raises:
        NotMet: the answer is no inference response, or does not fit the metadata.
    """
    head, rest = parted(status_is(answer, 200))
    name = typed(head.get("model_name"), str, "model_name")
    met(name == model.name, f"model_name is {name!r}; asked was {model.name!r}")
    found, at = dict[str, Tensor](), 0
    for item in typed(head.get("outputs"), list, f"outputs of {answer.said}"):
        entry = typed(item, dict, "an entry of outputs")
        described = _described(entry)
        size = typed(entry.get("parameters") or {}, dict, "parameters of an output").get("binary_data_size")
        if size is None:
            values = flat(*described, entry.get("data"))
        else:
            typed(size, int, "binary_data_size")
            met("data" not in entry, f"output {described[0]!r} has both data and binary_data_size")
            met(0 <= size <= len(rest) - at, f"output {described[0]!r} claims {size} bytes; {len(rest) - at} are left")
            values = unpacked(*described, rest[at : at + size])
            at += size
        found[described[0]] = Tensor(name=described[0], datatype=described[1], shape=described[2], values=values)
    met(at == len(rest), f"{len(rest) - at} bytes follow the last output")
    check_outputs(found, model, asked=asked)
    return found


def parted(answer: Answer) -> tuple[dict[str, Any], bytes]:
    """Give the JSON head of an answer, and the bytes behind it. Raises NotMet."""
    text = answer.headers.get(HEADER)
    if text is None:
        return answer.object(), b""
    met(re.fullmatch("[0-9]{1,15}", text.strip()) is not None, f"Inference-Header-Content-Length is {text!r}")
    size = int(text)
    met(0 < size <= len(answer.body), f"Inference-Header-Content-Length is {size}; the body has {len(answer.body)}")
    head = parsed(answer.said, answer.body[:size])
    return typed(head, dict, f"the head of {answer.said}, {shown(answer.body[:size])}"), answer.body[size:]


def _described(entry: Mapping[str, Any]) -> tuple[str, str, tuple[int, ...]]:
    name = typed(entry.get("name"), str, "the name of an output")
    datatype = typed(entry.get("datatype"), str, f"the datatype of output {name!r}")
    shape = typed(entry.get("shape"), list, f"the shape of output {name!r}")
    lengths = tuple(typed(length, int, f"a length in the shape of output {name!r}") for length in shape)
    met(all(length >= 0 for length in lengths), f"output {name!r} has the shape {list(lengths)}")
    return name, datatype, lengths


def check_outputs(found: Mapping[str, Tensor], model: Model, *, asked: Sequence[str] | None = None) -> None:
    """Check outputs against the metadata: those asked for (else all), their datatypes and shapes. Raises NotMet."""
    known: dict[str, Spec] = {spec.name: spec for spec in model.outputs}
    wanted = set(known if asked is None else asked)
    met(
        set(found) == wanted,
        f"the outputs are {sorted(found)}; {'all of them are' if asked is None else 'asked for is'} {sorted(wanted)}",
    )
    for name, tensor in found.items():
        spec = known[name]
        met(tensor.datatype == spec.datatype, f"output {name!r} is {tensor.datatype}; metadata say {spec.datatype}")
        met(
            fits(tensor.shape, spec),
            f"output {name!r} has the shape {list(tensor.shape)}; metadata say {list(spec.shape)}",
        )
