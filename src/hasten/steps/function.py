"""``function``: the user's own code, where the server's operator lets it run."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np

from hasten.errors import BadRequest, InvalidSetting, StoreError
from hasten.settings import Doc
from hasten.steps.step import Around, Opened, Place, Specs, Values, found, with_new
from hasten.tensors import DTYPES, Array, Dim, Feed, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A tensor that a function reads or makes, without the batch axis."""

    name: str
    dtype: str
    shape: tuple[Dim, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        """The same as a specification."""
        return TensorSpec(self.name, self.dtype, self.shape)


@dataclass(frozen=True, kw_only=True)
class Function:
    """Call a Python function with arrays by name; it gives arrays by name.

    Before the model it is called for each row, without the batch axis; after it with all rows of a request, [n, ...].
    It is called from several threads at once, and may write to the arrays that it is given. Its file is looked for
    below the folder that ``--allow-code`` names, never in the bundle: a deployment says which function, the server's
    operator says whose code. A ``ValueError`` that it raises is the client's fault and becomes a 400 with its text;
    anything else is a fault of the server, and so is an array of another dtype, shape or number of rows than declared.

    Raises:
        InvalidSetting: the function is not written as FILE.py:NAME, or a tensor's dtype is none.
    """

    name: ClassVar[str] = "function"
    places: ClassVar[frozenset[Place]] = frozenset({"pre", "post"})

    function: Annotated[str, Doc("FILE.py:NAME, below the folder of --allow-code")]
    reads: Annotated[tuple[Declared, ...], Doc("tensors that it is given: name, dtype, shape without the batch axis")]
    makes: Annotated[tuple[Declared, ...], Doc("tensors that it gives, in place of what it is given")]

    def __post_init__(self) -> None:
        file, _, called = self.function.rpartition(":")
        if not file.endswith(".py") or not called.isidentifier():
            raise InvalidSetting(f"{self.name}: function = {self.function!r}: write FILE.py:NAME")
        for tensor in (*self.reads, *self.makes):
            if tensor.dtype not in DTYPES:
                raise InvalidSetting(f"{self.name}: {tensor.name!r} has dtype {tensor.dtype!r}; known: {list(DTYPES)}")

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read what is declared."""
        return tuple(tensor.spec for tensor in self.reads)

    def gives(self, given: Specs) -> Specs:
        """Make what is declared."""
        for tensor in self.reads:
            found(given, tensor.name)
        names = tuple(tensor.name for tensor in self.reads)
        return with_new(given, *(tensor.spec for tensor in self.makes), instead_of=names)

    def open(self, around: Around, given: Specs) -> Opened:
        """Import the file."""
        call = load(self.function, around.code)
        names = [tensor.name for tensor in self.reads]
        after = around.place == "post"

        def apply(values: Feed) -> Values:
            left = {name: value for name, value in values.items() if name not in names}
            rows = (len(next(iter(values.values()))),) if after and values else ()
            try:
                made = call({name: values[name].copy() for name in names})  # others may read what it writes to
            except ValueError as error:
                raise BadRequest(f"{self.function}: {error}") from error
            return {**left, **self._checked(made, rows)}

        return Opened(apply)

    def _checked(self, made: Any, rows: tuple[int, ...]) -> Values:
        """Give what the function made as arrays, [*rows, ...]. Raises TypeError: it is not what is declared."""
        if not isinstance(made, Mapping) or made.keys() != {tensor.name for tensor in self.makes}:
            got = sorted(map(str, made)) if isinstance(made, Mapping) else type(made).__name__
            raise TypeError(f"{self.function} gave {got}; it is declared to give {[t.name for t in self.makes]}")
        ready: Values = {}
        for tensor in self.makes:
            array: Array = np.asarray(made[tensor.name])
            if tensor.dtype != "string" and array.dtype != DTYPES[tensor.dtype]:
                raise TypeError(f"{self.function} gave {tensor.name!r} as {array.dtype}; declared is {tensor.dtype}")
            if problem := TensorSpec(tensor.name, tensor.dtype, (*rows, *tensor.shape)).mismatch(array):
                raise TypeError(f"{self.function} gave something else than it declares: {problem}")
            if tensor.dtype == "string":
                array = array.astype(object)
                others = [item for item in array.ravel().tolist() if not isinstance(item, (str, bytes))]
                if others:
                    raise TypeError(f"{self.function} gave {tensor.name!r} with {others[0]!r:.80}; declared is string")
            ready[tensor.name] = array
        return ready


def load(reference: str, folder: Path | None) -> Callable[[Feed], Any]:
    """Import a function from below the folder of code that is allowed.

    Raises:
        StoreError: no code is allowed, the file lies elsewhere or cannot be imported, or has no such function.
    """
    if folder is None:
        raise StoreError(f"it wants to run {reference}, and this server runs no code of deployments; see --allow-code")
    file, _, name = reference.rpartition(":")
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise StoreError(f"there is no {file} below the folder of code {folder}")
    module_name = f"hasten_steps_{path.stem}_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise StoreError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look a class's module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself must not end the server
        line = " ".join(str(error).split())[:300]
        raise StoreError(f"{path} cannot be imported: {type(error).__name__}: {line}") from error
    function: Callable[[Feed], Any] | None = getattr(module, name, None)
    if not callable(function):
        raise StoreError(f"{path} has no function {name!r}")
    return function
