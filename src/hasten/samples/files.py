"""Columns from NumPy archives, from folders of images, and from a Python function."""

from __future__ import annotations

import importlib.util
import io
import sys
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import IO, Any

import numpy as np

from hasten.errors import BadInput
from hasten.samples.columns import Column, Columns, Images, Room
from hasten.samples.samples import Samples
from hasten.tensors import NOT_LITERAL, NPZ_DAMAGES, Array

IMAGE_ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}

MAX_HEADER_BYTES = 10_000
"""NumPy itself refuses to parse a longer header."""

HEADERS = {(1, 0): (2, np.lib.format.read_array_header_1_0), (2, 0): (4, np.lib.format.read_array_header_2_0)}
"""By version of NumPy's format: in how many bytes a header's length stands, and what parses it."""


def read_npz(path: Path, room: Room) -> Columns:
    """Read the arrays of an ``.npz`` file. Each is read after its header says that it fits; nothing is unpickled.

    Raises:
        BadInput: it is damaged, encrypted or compressed in a way that NumPy does not know; or it holds Python objects,
            a single value, or arrays that need too much memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members: dict[str, tuple[zipfile.ZipInfo, Header]] = {}
            for info in archive.infolist():
                if info.filename.endswith(".npy"):
                    _check_member(info, path, known=members)
                    with archive.open(info) as file:
                        members[info.filename] = info, _header(file, f"{path}: {info.filename}")
            room.check(sum(_needed(header, room) for _, header in members.values()), path.name)
            arrays: dict[str, Column] = {}
            for name, (info, header) in members.items():
                with archive.open(info) as file:
                    _header(file, f"{path}: {name}")
                    arrays[name.removesuffix(".npy")] = _rows(file, *header, room)
    except NPZ_DAMAGES as error:
        raise BadInput(f"{path} cannot be read as an NPZ file: {error}") from error
    if not arrays:
        raise BadInput(f"{path} holds no arrays")
    return Columns(by_name=arrays)


Header = tuple[tuple[int, ...], bool, np.dtype[Any]]
"""Shape, whether the first axis is the fastest, dtype."""


def _check_member(info: zipfile.ZipInfo, path: Path, known: Container[str]) -> None:
    """Check what NumPy's own writer would never do. Only these two ways of storing give no more than is asked for."""
    if info.filename in known:
        raise BadInput(f"{path} holds two arrays called {info.filename!r}")
    if info.flag_bits & 1:
        raise BadInput(f"{path}: {info.filename} is encrypted; save it again with numpy.savez")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise BadInput(
            f"{path}: {info.filename} is compressed by method {info.compress_type}, and NumPy writes only 0 and 8; "
            "save it again with numpy.savez_compressed"
        )


def _header(file: IO[bytes], what: str) -> Header:
    version = np.lib.format.read_magic(file)
    if version not in HEADERS:
        raise BadInput(f"{what} has version {version} of NumPy's format, which is for structures")
    width, parse = HEADERS[version]
    length = file.read(width)
    if (claimed := int.from_bytes(length, "little")) > MAX_HEADER_BYTES:
        raise BadInput(f"{what} claims a header of {claimed:,} bytes; hasten reads no more than {MAX_HEADER_BYTES:,}")
    try:
        shape, fortran, dtype = parse(io.BytesIO(length + file.read(claimed)))
    except NOT_LITERAL as error:
        raise BadInput(f"{what} has a damaged header: {_line(error)}") from error
    if dtype.hasobject or dtype.names or dtype.subdtype:
        raise BadInput(f"{what} holds Python objects or structures; hasten reads plain arrays only")
    if not shape:
        raise BadInput(f"{what} is a single value; an array of samples has one row for each")
    if min(shape) < 0:
        raise BadInput(f"{what} has a negative length in its shape {list(shape)}")
    if 0 in shape[1:]:
        raise BadInput(f"{what} has the shape {list(shape)}: its rows hold nothing")
    return shape, fortran, dtype


def _needed(header: Header, room: Room) -> int:
    shape, fortran, dtype = header
    rows = shape[0] if fortran else room.rows(shape[0])
    return int(np.prod((rows, *shape[1:]), dtype=object)) * dtype.itemsize


def _rows(file: IO[bytes], shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any], room: Room) -> Array:
    """Read the rows that are wanted; with the first axis fastest, they are all over the file."""
    rows = room.rows(shape[0])
    size = _needed((shape, fortran, dtype), room)
    data = bytearray(file.read(size))
    if len(data) != size:
        raise ValueError(f"an array has {len(data)} bytes, its header says {size}")
    if fortran:
        return np.ascontiguousarray(np.frombuffer(data, dtype).reshape(shape[::-1]).transpose()[:rows])
    return np.frombuffer(data, dtype).reshape(rows, *shape[1:])


def read_image_folder(folder: Path, room: Room) -> Columns:
    """List the images of a folder: one sub-folder a class, in sorted order, or no sub-folders and no labels.

    With a limit, the classes take turns, so that each has its share.

    Raises:
        BadInput: there is no image, or a class without one.
    """
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        images = _images_below(folder)
        if not images:
            raise BadInput(f"{folder} holds no images ({', '.join(sorted(IMAGE_ENDINGS))}) and no folders of them")
        return Columns(by_name={"image": Images(images[: room.limit])})
    by_class = [_images_below(path) for path in classes]
    for path, images in zip(classes, by_class, strict=True):
        if not images:
            raise BadInput(f"the class folder {path} holds no images ({', '.join(sorted(IMAGE_ENDINGS))})")
    labelled = [[(path, index) for path in images] for index, images in enumerate(by_class)]
    turns = [item for item in chain.from_iterable(zip_longest(*labelled)) if item is not None]
    chosen = sorted(turns[: room.limit], key=lambda item: item[1])
    return Columns(
        by_name={
            "image": Images([path for path, _ in chosen]),
            "label": np.array([index for _, index in chosen], np.int64),
        },
        label="label",
        classes=tuple(path.name for path in classes),
    )


def _images_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS and path.is_file())


def read_function(reference: str, room: Room) -> Columns | Samples:
    """Call ``module.py:function``: it gives ``Samples``, arrays by name, or ``(inputs, labels)``.

    This runs the user's own code, named on the command line.

    Raises:
        BadInput: it is not there, it fails, or it gives something else.
    """
    value = call(load_function(reference), reference)
    if isinstance(value, Samples):
        return value if room.limit is None else value.take(range(room.rows(len(value))))
    label = None
    if isinstance(value, tuple) and len(value) == 2:
        inputs, labels = value
        value = {**(inputs if isinstance(inputs, Mapping) else {"x": inputs}), "label": labels}
        label = "label"
    if not isinstance(value, Mapping):
        raise BadInput(
            f"{reference} gave a {type(value).__name__}; it must give Samples, a dictionary of arrays, "
            "or (inputs, labels)"
        )
    try:
        arrays = {str(name): np.asarray(array) for name, array in value.items()}
    except (ValueError, TypeError, RuntimeError) as error:  # lists of unequal length, a tensor that has gradients
        said = " ".join(str(error).split())[:200]
        raise BadInput(f"{reference}: what it gave cannot be made an array: {said}") from error
    for name, array in arrays.items():
        if array.dtype.kind == "O" or not array.ndim:
            raise BadInput(f"{reference}: {name!r} is no array of numbers with one row a sample")
    return Columns(by_name={name: array[: room.limit] for name, array in arrays.items()}, label=label)


def load_function(reference: str) -> Callable[[], Any]:
    """Import ``module.py:function`` from its file. The file may import its neighbours.

    Raises:
        BadInput: the file or the function is not there, or importing it fails.
    """
    file_name, _, name = reference.rpartition(":")
    path = Path(file_name)
    if not path.is_file():
        raise BadInput(f"there is no file {file_name!r}; write module.py:function")
    spec = importlib.util.spec_from_file_location(f"hasten_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{file_name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and torch look a class's module up there
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(str(path.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise BadInput(f"{file_name} cannot be imported: {type(error).__name__}: {_line(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise BadInput(f"{file_name} has no function {name!r}; it has {', '.join(_callables(module)) or 'none'}")
    found: Callable[[], Any] = function
    return found


def call(function: Callable[[], Any], reference: str) -> Any:
    """Call the user's function.

    Raises:
        BadInput: it raised something; its class and message are kept.
    """
    try:
        return function()
    except Exception as error:
        raise BadInput(f"{reference} failed: {type(error).__name__}: {_line(error)}") from error


def _callables(module: Any) -> Iterator[str]:
    for name, value in vars(module).items():
        if callable(value) and getattr(value, "__module__", None) == module.__name__:
            yield name


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
