"""What ONNX Runtime's exceptions mean: each becomes one clear line of the right class."""

from __future__ import annotations

import re

from hasten.errors import BuildFailed, HastenError, StoreError, Unsupported

PREFIX = re.compile(r"^\[ONNXRuntimeError\] : \d+ : (\w+) : ")
NO_KERNEL = re.compile(r"Could not find an implementation for (?:[\w.]+:)?(\w+)\(\d+\) node with name '([^']*)'")
NO_OPERATOR = re.compile(r"Fatal error: (\S+?)\(-?\d+\) is not a registered function/op")
NO_SCHEMA = re.compile(r"No (?:Op|opset import|schema) registered for (\S+)")
NO_TYPE = re.compile(
    r"Type '(\S+)' of input parameter \(([^)]*)\) of operator \((\w+)\) in node \(([^)]*)\) is invalid"
)
NO_OPSET = re.compile(r"Opset (\d+) is under development.*support for domain (\S+) is till opset (\d+)")
DAMAGED = ("INVALID_PROTOBUF", "NO_SUCHFILE", "NO_MODEL")


def refusal(engine: str, error: Exception, *, running: bool = False) -> HastenError:
    """Give what to raise for an exception of ONNX Runtime.

    Args:
        engine: How messages call the engine.
        error: What ONNX Runtime raised.
        running: It came from a run; else from loading.
    """
    text = " ".join(str(error).split())
    if found := NO_KERNEL.search(text):
        return Unsupported(engine, f"it has no kernel for {found[1]} in this dtype (node {found[2]!r})")
    if found := NO_OPERATOR.search(text) or NO_SCHEMA.search(text):
        return Unsupported(engine, f"it has no operator {found[1]}")
    if found := NO_TYPE.search(text):
        return Unsupported(engine, f"{found[3]} takes no {found[1]} for {found[2]!r} (node {found[4]!r})")
    if found := NO_OPSET.search(text):
        return Unsupported(engine, f"it knows the domain {found[2]} up to opset {found[3]}, the model has {found[1]}")
    kind = PREFIX.match(text)
    reason = PREFIX.sub("", text)[:500]
    if kind and kind[1] in DAMAGED:
        return StoreError(f"{engine} cannot read the model: {reason}")
    return BuildFailed(f"{engine} run" if running else engine, reason)
