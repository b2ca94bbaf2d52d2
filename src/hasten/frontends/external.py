"""External data of an ONNX model: where it points is checked before anything there is opened."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx

from hasten.errors import BadInput


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Give every constant tensor: initializers and attributes, also inside graphs of nodes and functions."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def check_external_data(model: onnx.ModelProto, folder: Path, *, memory_bytes: int) -> None:
    """Check that every external tensor lies in an existing file inside ``folder``, within its bounds.

    Raises:
        BadInput: names the tensor, and the place that it points to.
    """
    total = 0
    for tensor in tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            total += _check_tensor(tensor, folder)
    if total > memory_bytes:
        raise BadInput(
            f"the model's external data takes {total / 2**30:.1f} GiB, more than half of this machine's memory"
        )


def _check_tensor(tensor: onnx.TensorProto, folder: Path) -> int:
    entries = {item.key: item.value for item in tensor.external_data}
    location = entries.get("location", "")
    path = _inside(tensor.name, location, folder)
    if not path.is_file():
        raise BadInput(f"the external data of tensor {tensor.name!r} is missing: there is no file {location!r}")
    size = path.stat().st_size
    try:
        offset = int(entries.get("offset", 0))
        length = int(entries["length"]) if "length" in entries else size - offset
    except ValueError as error:
        raise BadInput(f"tensor {tensor.name!r} has external data without readable offset and length") from error
    if offset < 0 or length < 0 or offset + length > size:
        raise BadInput(
            f"tensor {tensor.name!r} wants bytes {offset} to {offset + length} of {location!r}, which has {size}"
        )
    return length


def _inside(name: str, location: str, folder: Path) -> Path:
    """Give the file that a tensor points to.

    Raises:
        BadInput: it is outside ``folder``, by its name or through a link.
    """
    posix, windows = PurePosixPath(location), PureWindowsPath(location)
    outside = not location or posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts
    path = folder / location
    if outside or ".." in posix.parts or not path.resolve().is_relative_to(folder.resolve()):
        raise BadInput(
            f"the external data of tensor {name!r} points outside the model's folder: {location!r}; nothing was read"
        )
    return path


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for item in node.attribute:
            yield from (*item.tensors, *([item.t] if item.HasField("t") else ()))
            for sparse in (*item.sparse_tensors, *([item.sparse_tensor] if item.HasField("sparse_tensor") else ())):
                yield from (sparse.values, sparse.indices)
            for graph in (*item.graphs, *([item.g] if item.HasField("g") else ())):
                yield from _of_graph(graph)
