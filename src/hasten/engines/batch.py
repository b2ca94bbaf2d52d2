"""A batch axis of fixed length: what an engine needs that compiles for one shape."""

from __future__ import annotations

from dataclasses import replace

from hasten.tensors import Signature, TensorSpec


def open_batch(signature: Signature) -> str | None:
    """Give the name of the symbolic dimension that the inputs begin with, or None where they begin with none."""
    names = [spec.shape[0] for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], str)]
    return str(names[0]) if names else None


def why_not_batch(signature: Signature, batch: int) -> str | None:
    """Say in a sentence why the batch cannot be fixed at ``batch``, or None."""
    firsts = {spec.name: spec.shape[0] for spec in signature.inputs if spec.shape}
    open_axes = sorted({dim for dim in firsts.values() if isinstance(dim, str)})
    if len(open_axes) > 1:
        return f"its inputs begin with different open axes ({', '.join(open_axes)}), so none of them is the batch"
    for name, dim in firsts.items():
        if isinstance(dim, int) and dim != batch:
            return f"input {name!r} has {dim} rows by itself, so the batch cannot be {batch}"
    return None


def with_batch(signature: Signature, batch: int) -> Signature:
    """Give the signature with its open batch axis replaced by ``batch``, in inputs and outputs."""
    name = open_batch(signature)

    def fixed(spec: TensorSpec) -> TensorSpec:
        return replace(spec, shape=tuple(batch if dim == name else dim for dim in spec.shape))

    return Signature(tuple(map(fixed, signature.inputs)), tuple(map(fixed, signature.outputs)))
