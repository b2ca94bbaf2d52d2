"""``tokenise``: text becomes the numbers that a language model takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from msgspec import Meta
from tokenizers import Encoding, Tokenizer

from hasten.errors import BadRequest, InvalidSetting, SignatureMismatch, StoreError
from hasten.settings import Doc
from hasten.steps.step import Around, Opened, Place, Specs, Values, found, with_new
from hasten.tensors import DTYPES, Feed, TensorSpec


@dataclass(frozen=True, kw_only=True)
class Tokenise:
    """Tokenise text by a ``tokenizer.json`` of the library tokenizers, which lies in the deployment's folder.

    The model gets numbers [length], and a mask that is 1 where there is a token. Rows of one request are filled up to
    the longest of them, or all to ``max_length``.

    Raises:
        InvalidSetting: two outputs have one name.
    """

    name: ClassVar[str] = "tokenise"
    places: ClassVar[frozenset[Place]] = frozenset({"pre"})

    input: Annotated[str, Doc("tensor with the text, in UTF-8; what a client sends")] = "text"
    pair: Annotated[str | None, Doc("tensor with a second text for each row, as an answer to a question")] = None
    file: Annotated[str, Doc("the tokenizer, in the deployment's folder")] = "tokenizer.json"
    max_length: Annotated[Annotated[int, Meta(ge=1, le=1 << 20)], Doc("tokens that a row may have")] = 512
    truncate: Annotated[bool, Doc("cut what is longer; else it is refused")] = True
    padding: Annotated[Literal["longest", "max"], Doc("fill up to a request's longest row, or to ``max_length``")] = (
        "longest"
    )
    pad: Annotated[int, Doc("the number of the token that fills up")] = 0
    special: Annotated[bool, Doc("add the tokenizer's own tokens, as [CLS]")] = True
    ids: Annotated[str, Doc("what the numbers are called: the model's input")] = "input_ids"
    mask: Annotated[str | None, Doc("what the mask is called; none: the model takes none")] = "attention_mask"
    types: Annotated[str | None, Doc("what the numbers of the two texts are called; none: the model takes none")] = None
    dtype: Annotated[Literal["int64", "int32"], Doc("of all of them")] = "int64"
    max_bytes: Annotated[Annotated[int, Meta(ge=1)], Doc("bytes over which a text is refused")] = 1 << 20

    def __post_init__(self) -> None:
        if len(set(self.outputs)) < len(self.outputs):
            raise InvalidSetting(f"{self.name}: ids, mask and types are called {list(self.outputs)}; names must differ")

    @property
    def outputs(self) -> tuple[str, ...]:
        """What it makes, in order."""
        return tuple(name for name in (self.ids, self.mask, self.types) if name is not None)

    @property
    def inputs(self) -> tuple[str, ...]:
        """What it reads, in order."""
        return (self.input,) if self.pair is None else (self.input, self.pair)

    def takes(self, wanted: Specs) -> tuple[TensorSpec, ...]:
        """Read text."""
        return tuple(TensorSpec(name, "string", ()) for name in self.inputs)

    def gives(self, given: Specs) -> Specs:
        """Make numbers of one length."""
        for name in self.inputs:
            if (spec := found(given, name)).dtype != "string" or spec.shape:
                raise SignatureMismatch(f"it wants a text for each row, and {name!r} is {spec}")
        length: int | str = self.max_length if self.padding == "max" else "length"
        made = [TensorSpec(name, self.dtype, (length,)) for name in self.outputs]
        return with_new(given, *made, instead_of=self.inputs)

    def open(self, around: Around, given: Specs) -> Opened:
        """Read the tokenizer."""
        tokenizer = read_tokenizer(around, self.file)
        left = (tokenizer.padding or {}).get("direction") == "left"
        if left and self.padding == "longest":
            raise SignatureMismatch(
                'the tokenizer fills up on the left, and rows of a batch at their end; use padding = "max"'
            )
        tokenizer.no_padding()
        if self.truncate:
            self._truncating(tokenizer)
        else:
            tokenizer.no_truncation()

        def apply(values: Feed) -> Values:
            text = self._text(self.input, values)
            pair = None if self.pair is None else self._text(self.pair, values)
            try:
                found = tokenizer.encode(text, pair, add_special_tokens=self.special)
            except Exception as error:  # a bare one, as where only the second text may be cut and the first is too long
                raise BadRequest(f"the text cannot be tokenised: {error}") from error
            others = {name: value for name, value in values.items() if name not in self.inputs}
            return {**others, **self._arrays(found, left=left)}

        fills = {self.ids: self.pad, **({self.mask: 0} if self.mask else {}), **({self.types: 0} if self.types else {})}
        return Opened(apply, fills if self.padding == "longest" else {})

    def _truncating(self, tokenizer: Tokenizer) -> None:
        needed = tokenizer.num_special_tokens_to_add(self.pair is not None) if self.special else 0
        if needed >= self.max_length:
            raise SignatureMismatch(
                f"max_length = {self.max_length} leaves no room beside the tokenizer's own {needed} tokens"
            )
        own = tokenizer.truncation or {}
        if own.get("strategy") == "only_second" and self.pair is None:
            raise SignatureMismatch(
                "the tokenizer cuts the second text alone (its truncation strategy is only_second), and there is none; "
                "name a pair, set truncate = false, or change the strategy in its file to longest_first"
            )
        # Its stride is how far the pieces that are cut off overlap; nobody reads them, and it may be over max_length.
        kept = {name: own[name] for name in ("strategy", "direction") if name in own}
        tokenizer.enable_truncation(self.max_length, **kept)

    def _text(self, name: str, values: Feed) -> str:
        data = values[name].item()
        if not isinstance(data, bytes):
            data = str(data).encode()
        if len(data) > self.max_bytes:
            raise BadRequest(f"the text has {len(data)} bytes; at most {self.max_bytes} are taken")
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise BadRequest(f"the text is no UTF-8: {error.reason} at byte {error.start}") from error

    def _arrays(self, found: Encoding, *, left: bool) -> Values:
        length = len(found.ids)
        if length > self.max_length:
            raise BadRequest(f"the text has {length} tokens; at most {self.max_length} are taken")
        if not length:
            raise BadRequest("the text has no token at all; send one that is not empty")
        room = self.max_length if self.padding == "max" else length
        columns = {self.ids: (found.ids, self.pad), self.mask: ([1] * length, 0), self.types: (found.type_ids, 0)}
        made: Values = {}
        for name, (numbers, fill) in columns.items():
            if name is not None:
                made[name] = np.full(room, fill, DTYPES[self.dtype])
                made[name][room - length if left else 0 :][:length] = numbers
        return made


def read_tokenizer(around: Around, name: str) -> Tokenizer:
    """Read a tokenizer from the bundle. Raises StoreError: it is missing, or no tokenizer."""
    path = around.file(name)
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # the library raises a bare one for whatever is wrong with a file
        line = " ".join(str(error).split())[:200]
        raise StoreError(f"{path} is no tokenizer.json that can be read: {line}") from error
