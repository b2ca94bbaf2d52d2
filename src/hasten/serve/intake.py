"""Requests against a model's signature: what fits is taken in, what does not is told which tensor, wanted and got."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

import numpy as np

from hasten.errors import BadRequest, SignatureMismatch
from hasten.protocol.messages import InferRequest, RequestedOutput
from hasten.steps.step import with_rows
from hasten.tensors import Array, Feed, Signature, TensorSpec

KNOWN_SHAPES = 256
"""Shapes of requests that are remembered as fitting; beyond, all are forgotten."""


def batch_axis(signature: Signature, batch: int) -> str | int | None:
    """Say what axis 0 of every tensor is: a symbolic dimension, the fixed length of a batch, or None: no batch.

    A fixed length counts as a batch where it is 1, or what the deployment says that its batch is: a request of other
    rows is padded, or takes more runs. Nothing else can be meant where it is 1: each row is run alone.
    """
    firsts = {spec.shape[0] if spec.shape else None for spec in (*signature.inputs, *signature.outputs)}
    if len(firsts) != 1:
        return None
    first = firsts.pop()
    return first if isinstance(first, str) or first in (1, batch) else None


class TakenIn:
    """A request that fits: its feed, its rows (1 where the model has no batch axis), and its bytes.

    Those with one ``key`` may share a run.
    """

    def __init__(self, feed: Feed, rows: int, key: Hashable, n_bytes: int) -> None:
        self.feed = feed
        self.rows = rows
        self.key = key
        self.n_bytes = n_bytes


class Intake:
    """Checks requests and gives their feed. Shapes that were seen before cost a look-up. One thread at a time.

    With ``as_bytes``, BYTES stay what they are: steps read files of images, which are no text.
    """

    def __init__(self, signature: Signature, axis: str | int | None, *, as_bytes: bool = False) -> None:
        self._axis = axis
        self._signature = opened(signature) if isinstance(axis, int) else signature
        self._text = [spec.name for spec in signature.inputs if spec.dtype == "string" and not as_bytes]
        self._known: dict[Hashable, tuple[int, Hashable, int]] = {}
        self._outputs = {spec.name for spec in signature.outputs}
        self._token = object()
        """Stands for this one in the notes on forms, which may outlive it."""

    def take(self, request: InferRequest) -> TakenIn:
        """Give what a request brings.

        Raises:
            BadRequest: an input does not fit, or an output that was asked for is not there.
        """
        feed: dict[str, Array] = {}
        for tensor in request.inputs:
            feed[tensor.name] = tensor.data
        form = request.form
        if form is not None and not self._text:
            noted = form.fits
            if noted is None or noted[0] is not self._token:
                noted = form.fits = (self._token, self._found(request, feed))
            rows, key, n_bytes = noted[1]
            return TakenIn(feed, rows, key, n_bytes)
        rows, key, n_bytes = self._found(request, feed)
        for name in self._text:
            n_bytes += content_bytes(feed[name])
            feed[name] = _text(name, feed[name])
        return TakenIn(feed, rows, key, n_bytes)

    def fit(self, feed: Feed) -> TakenIn:
        """Give what steps made of a request. Raises BadRequest: it does not fit."""
        rows, key, n_bytes = self._measured(feed)
        n_bytes += sum([content_bytes(feed[name]) for name in self._text])
        texts = {name: _text(name, a) if name in self._text else a for name, a in feed.items()}
        return TakenIn(texts, rows, key, n_bytes)

    def _found(self, request: InferRequest, feed: Feed) -> tuple[int, Hashable, int]:
        described = tuple([(t.name, t.data.dtype, t.data.shape) for t in request.inputs])
        found = self._known.get(described)
        if found is None:
            found = self._checked(request, feed)
            if len(self._known) >= KNOWN_SHAPES:
                self._known.clear()
            self._known[described] = found
        if request.outputs:
            self._check_outputs(request.outputs)
        return found

    def _checked(self, request: InferRequest, feed: Feed) -> tuple[int, Hashable, int]:
        if len(feed) < len(request.inputs):
            names = [tensor.name for tensor in request.inputs]
            raise BadRequest(f"input {max(names, key=names.count)!r} is given twice")
        return self._measured(feed)

    def _measured(self, feed: Feed) -> tuple[int, Hashable, int]:
        try:
            self._signature.check(feed)
        except SignatureMismatch as error:
            raise BadRequest(str(error)) from error
        empty = [name for name, array in feed.items() if not array.size]
        if empty:
            raise BadRequest(
                f"input {empty[0]!r} is empty: its shape is {list(feed[empty[0]].shape)}; send a row or more"
            )
        shapes = frozenset((name, array.shape[1:] if self._axis else array.shape) for name, array in feed.items())
        rows = len(next(iter(feed.values()))) if self._axis is not None else 1
        return rows, shapes, sum([array.nbytes for array in feed.values()])

    def _check_outputs(self, asked: tuple[RequestedOutput, ...]) -> None:
        names = [output.name for output in asked]
        for name in names:
            if name not in self._outputs:
                raise BadRequest(f"the model has no output {name!r}; it has {sorted(self._outputs)}")
        if len(set(names)) < len(names):
            raise BadRequest(f"output {max(names, key=names.count)!r} is asked for twice")


def opened(signature: Signature) -> Signature:
    """Give the signature of a fixed batch with that axis open."""

    def with_open(spec: TensorSpec) -> TensorSpec:
        return with_rows(replace(spec, shape=spec.shape[1:]))

    return Signature(tuple(map(with_open, signature.inputs)), tuple(map(with_open, signature.outputs)))


def content_bytes(array: Array) -> int:
    """Give the bytes of an array's elements, of texts and files those that they hold."""
    if array.dtype != object:
        return array.nbytes
    return sum([len(item) if isinstance(item, (bytes, str)) else 8 for item in array.ravel().tolist()])


def _text(name: str, data: Array) -> Array:
    """Give BYTES as the text that engines take."""
    held = np.empty(data.size, object)
    try:
        held[:] = [item.decode() if isinstance(item, bytes) else str(item) for item in data.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise BadRequest(f"input {name!r} holds bytes that are no UTF-8: {error.reason} at {error.start}") from error
    return held.reshape(data.shape)
