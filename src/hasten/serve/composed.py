"""A deployment made of others, alive: requests go to its members, and their answers become one.

To a client it is a model like any other. Its ``infer`` phase is the time until the last member has answered; what that
consists of stands under the members' own names, whose figures count these requests too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from hasten.artifact import Json
from hasten.composition import RAW, Cascade, Composition, Member, check_no_cycle
from hasten.errors import BadRequest, ModelNotFound, ModelNotReady, ServeError, StoreError
from hasten.protocol.messages import InferRequest, ModelMetadata, TensorMetadata
from hasten.serve.asking import Asking, AskingCascade, AskingEnsemble, Asks
from hasten.serve.repository import Bundle
from hasten.serve.state import State
from hasten.serve.statistics import Statistics
from hasten.serve.surroundings import Members, Surroundings
from hasten.serve.ticket import Done, Marks, Ticket

MEMBER = TensorMetadata(name="member", datatype="INT64", shape=(-1,))
"""The output of a cascade that says which member answered a row, from 0."""


class Composed:
    """A version of a deployment made of others. ``await load()`` first; on the event loop's thread alone."""

    has_raw = False
    instances = 1

    def __init__(self, bundle: Bundle, composition: Composition, around: Surroundings) -> None:
        self.name = bundle.name
        self.version = bundle.version
        self.bundle = bundle
        self.composition = composition
        self.statistics = Statistics()
        self.state = State.LOADING
        self._around = around
        self._inside: set[Asking] = set()
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._inputs: tuple[TensorMetadata, ...] = ()
        self._outputs: tuple[TensorMetadata, ...] = ()
        self._about: list[ModelMetadata] = []
        """What each member said of itself when this was loaded."""
        self._misfit = ""
        """Why the members that are there now do not fit; nothing where they do."""

    async def load(self) -> None:
        """Wait for the members, loading those that are not there, and check that they fit together.

        Raises:
            HastenError: why it cannot serve; it is ``FAILED`` then.
        """
        members = self._members()
        try:
            check_no_cycle(self.name, members.members_of)
            for member in self.composition.members:
                if not self._has(member.name):
                    await self._bring(member)
            self._about = self._told()
            self._inputs, self._outputs = self._fitted(self._about)
        except BaseException:
            self.state = State.FAILED
            raise
        self.state = State.READY

    def refit(self) -> None:
        """Look whether the members still fit, now that one of them is another or has gone.

        What clients were told when this was loaded holds: members that would have it give other tensors do not fit.
        """
        try:
            about = self._told()
        except ServeError:  # one is not there, and says so where it is asked
            self._misfit = ""
        else:
            self._misfit = self._mismatch(about)

    @property
    def fits(self) -> bool:
        """Its members give what clients were told, as far as they are there."""
        return not self._misfit

    @property
    def ready(self) -> bool:
        """It takes requests, and all its members do."""
        return not self.unready

    @property
    def unready(self) -> str:
        """Why it is not ready; nothing where it is."""
        if self.state is not State.READY:
            return f"it is {self.state.name.lower()}"
        members = self._members()
        for member in self.composition.members:
            try:
                if not members.model_ready(member.name, member.version):
                    return f"member {str(member)!r} is not ready"
            except ServeError as error:
                return str(error)
        return self._misfit

    @property
    def inside(self) -> int:
        """Requests that have not ended."""
        return len(self._inside)

    @property
    def takes_image(self) -> bool:
        """Every member's only input is the file of an image."""
        return all(self._members().takes_image(member.name) for member in self.composition.members)

    def check_room(self, unless: Callable[[], bool]) -> None:
        """Each member has a queue of its own, and refuses for itself."""

    def shut(self) -> ServeError | None:
        """Say nothing: each member refuses for itself."""
        return None

    def submit(self, request: InferRequest, marks: Marks, done: Done) -> Ticket:
        """Take a request in; see ``Infers.submit``."""
        now_ns = self._around.clock_ns()
        if not marks.ns[2]:
            marks.ns[2] = now_ns
        asks = Asks(
            composition=self.composition,
            members=self._members(),
            clock_ns=self._around.clock_ns,
            outputs=self._outputs,
            version=self.version,
            statistics=self.statistics,
            left=self._left,
        )
        kind = AskingCascade if isinstance(self.composition.how, Cascade) else AskingEnsemble
        asking = kind(asks, request, marks, done)
        self._inside.add(asking)
        self._emptied.clear()
        if refused := self._refusal(request):
            asking.end(refused)
        else:
            asking.begin()
        return asking

    async def drain(self, limit_s: float) -> bool:
        """Take no more requests, and finish those inside for at most ``limit_s``; True if all were finished."""
        if self.state is State.READY:
            self.state = State.DRAINING
        try:
            await asyncio.wait_for(self._emptied.wait(), limit_s)
            finished = True
        except TimeoutError:
            finished = False
        for asking in list(self._inside):
            asking.end(ModelNotReady(f"model {self.name!r} was unloaded before this request was done"))
        if self.state is State.DRAINING:
            self.state = State.GONE
        return finished

    def fail(self) -> None:
        """It was loaded, and is not good enough."""
        self.state = State.FAILED

    def metadata(self, versions: tuple[str, ...], name: str | None = None) -> ModelMetadata:
        """Give what a client may know."""
        return ModelMetadata(
            name=name or self.name,
            versions=versions,
            platform=f"hasten_{self.composition.kind}",
            inputs=self._inputs,
            outputs=self._outputs,
        )

    def config(self, name: str | None = None) -> dict[str, Json]:
        """Give the configuration as Triton's extension has it: no batching of its own."""

        def listed(tensor: TensorMetadata) -> dict[str, Json]:
            kind = "STRING" if tensor.datatype == "BYTES" else tensor.datatype
            return {"name": tensor.name, "data_type": f"TYPE_{kind}", "dims": list(tensor.shape)}

        return {
            "name": name or self.name,
            "platform": f"hasten_{self.composition.kind}",
            "backend": "hasten",
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": 0,
            "input": [listed(tensor) for tensor in self._inputs],
            "output": [listed(tensor) for tensor in self._outputs],
            "parameters": {"members": {"string_value": ", ".join(self.composition.how.members)}},
        }

    def _refusal(self, request: InferRequest) -> ServeError | None:
        if self.state is not State.READY:
            return ModelNotReady(f"version {self.version} of model {self.name!r} is {self.state.name.lower()}")
        if self._misfit:
            return ModelNotReady(f"model {self.name!r} is not ready: {self._misfit}")
        names = [output.name for output in request.outputs]
        if len(set(names)) < len(names):
            return BadRequest(f"output {max(names, key=names.count)!r} is asked for twice")
        return None

    async def _bring(self, member: Member) -> None:
        try:
            await self._members().load(member.name, member.version)
        except ModelNotFound:
            if not member.name.endswith(RAW):
                raise
            await self._members().load(member.name.removesuffix(RAW), member.version)  # the one that it comes with

    def _told(self) -> list[ModelMetadata]:
        members = self._members()
        return [members.model_metadata(member.name, member.version) for member in self.composition.members]

    def _mismatch(self, about: Sequence[ModelMetadata]) -> str:
        if all(map(stands_in, about, self._about)):
            return ""
        try:
            inputs, outputs = self._fitted(about)
        except StoreError as error:
            return str(error)
        old = self.metadata(())
        if stands_in(replace(old, inputs=inputs, outputs=outputs), old):
            return ""
        return "with its members as they are now its tensors are others than when it was loaded; load it again"

    def _has(self, name: str) -> bool:
        try:
            return self._members().model_ready(name)
        except ModelNotFound:
            return False

    def _left(self, asking: Asking) -> None:
        self._inside.discard(asking)
        if not self._inside:
            self._emptied.set()

    def _members(self) -> Members:
        if self._around.members is None:
            raise StoreError(f"{self.bundle.path} is made of other deployments; serve the folder that has them all")
        return self._around.members

    def _fitted(self, about: Sequence[ModelMetadata]) -> tuple[tuple[TensorMetadata, ...], tuple[TensorMetadata, ...]]:
        """Give inputs and outputs where the members fit together. Raises StoreError: which does not, and why."""
        path, how, first = self.bundle.path, self.composition.how, about[0]
        for other in about[1:]:
            if _kinds(other.inputs) != _kinds(first.inputs):
                both = f"{_kinds(other.inputs)}, and {first.name!r} {_kinds(first.inputs)}"
                raise StoreError(f"{path}: member {other.name!r} takes {both}")
        scored = [{tensor.name: tensor for tensor in each.outputs}.get(how.scores) for each in about]
        for each, scores in zip(about, scored, strict=True):
            wanted = scored[0]
            if scores is None or not scores.datatype.startswith("FP") or len(scores.shape) != 2:
                raise StoreError(f"{path}: member {each.name!r} gives no scores {how.scores!r} of rows and classes")
            if wanted is not None and scores.shape[1] != wanted.shape[1]:
                raise StoreError(
                    f"{path}: member {each.name!r} has {scores.shape[1]} classes, and {first.name!r} {wanted.shape[1]}"
                )
        classes = -1 if scored[0] is None else scored[0].shape[1]
        if not isinstance(how, Cascade):
            return first.inputs, (TensorMetadata(name=how.scores, datatype="FP32", shape=(-1, classes)),)
        common = [
            tensor
            for tensor in first.outputs
            if all(tensor in each.outputs for each in about) and tensor.name != MEMBER.name
        ]
        if how.scores not in {tensor.name for tensor in common}:
            raise StoreError(f"{path}: the members give {how.scores!r} in different datatypes")
        return first.inputs, (*common, MEMBER)


def stands_in(fresh: ModelMetadata, old: ModelMetadata) -> bool:
    """Say whether clients of ``old`` can go on with ``fresh``: what they send is taken, and what they get was told.

    Names, datatypes and numbers of axes are the same. A fixed length of an input may have become any; one of an
    output may not, as clients may have made room for it, while any may have become a fixed one.
    """
    return _within(old.inputs, fresh.inputs) and _within(fresh.outputs, old.outputs)


def _within(some: Sequence[TensorMetadata], all_: Sequence[TensorMetadata]) -> bool:
    """Say whether whatever has the shapes of ``some`` has those of ``all_``."""
    return len(some) == len(all_) and all(
        (a.name, a.datatype, len(a.shape)) == (b.name, b.datatype, len(b.shape))
        and all(wide in (-1, narrow) for narrow, wide in zip(a.shape, b.shape, strict=True))
        for a, b in zip(some, all_, strict=True)
    )


def _kinds(tensors: Sequence[TensorMetadata]) -> list[str]:
    return [f"{tensor.name} {tensor.datatype}{list(tensor.shape)}" for tensor in tensors]
