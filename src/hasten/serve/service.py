"""The service: models by name, requests in, answers out. It knows no HTTP and no gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hasten.artifact import Json
from hasten.composition import RAW, read_composition
from hasten.errors import Cancelled, ModelNotFound, ModelNotReady, ServeError, StoreError
from hasten.host import this_host, versions
from hasten.protocol.messages import InferRequest, InferResponse, ModelMetadata, ServerMetadata
from hasten.serve.bursts import Bursts
from hasten.serve.composed import Composed
from hasten.serve.cork import Cork
from hasten.serve.lifecycle import Family, Version
from hasten.serve.pace import Pace
from hasten.serve.repository import Bundle, Repository, newest, pick
from hasten.serve.runner import Clock
from hasten.serve.scheduling import Scheduler
from hasten.serve.shared_memory import SharedMemory
from hasten.serve.state import State
from hasten.serve.surroundings import Surroundings
from hasten.serve.ticket import REFUSED, Done, Marks, Ticket
from hasten.serve.traces import Traces, end_trace
from hasten.serve.turns import Turns

logger = logging.getLogger(__name__)

EXTENSIONS = (
    *("binary_tensor_data", "model_configuration", "model_repository", "model_repository(unload_dependents)"),
    *("schedule_policy", "statistics"),
)
"""What the service can do beyond the protocol; the transports speak it."""

AWAY_S = 0.05
"""How long a bundle may be away while another takes its place."""


@dataclass(frozen=True)
class TracedTicket:
    """The ticket of a request that is traced."""

    ticket: Ticket
    marks: Marks

    def cancel(self) -> None:
        """Drop the request, and end its trace."""
        self.ticket.cancel()
        end_trace(self.marks, Cancelled("the client has left"))


def _ended(marks: Marks, done: Done, outcome: InferResponse | ServeError) -> None:
    """End the trace of a request that has no answer, and tell; that of an answer ends once it is sent."""
    if isinstance(outcome, ServeError):
        end_trace(marks, outcome)
    done(outcome)


def _unready(version: Version) -> str:
    if isinstance(version, Composed):
        return version.unready
    return "" if version.ready else "no worker is ready"


class Service:
    """Deployments alive. ``await start()`` first; every method on the event loop's thread.

    It has no port and no signal handlers, and starts nothing before ``start``. ``code`` is the folder whose Python
    files the steps of deployments may run; None: none. ``offline``: nobody waits for one answer, and the objectives,
    timeouts and bounds of deployments do not hold. ``gone`` is called when a version has gone. ``scheduler``:
    how threads are scheduled, the event loop's too (``bursts``); None: as they are.
    """

    def __init__(
        self,
        repository: Repository,
        *,
        clock_ns: Clock = time.perf_counter_ns,
        code: Path | None = None,
        shared_memory: SharedMemory | None = None,
        traces: Traces | None = None,
        offline: bool = False,
        gone: Callable[[], object] = lambda: None,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.repository = repository
        self.shared_memory = shared_memory
        """The regions that clients have registered; None: they may register none."""
        self.traces = traces
        """Who traces requests: a transport begins a trace, the service ends it. None: nobody."""
        self._code = code
        self._offline = offline
        self._clock_ns = clock_ns
        self._families: dict[str, Family] = {}
        self._known: dict[str, dict[str, Bundle]] = {}
        self.cork = Cork()
        """Active while a batch is answered: transports then hold what they write."""
        self.turns = Turns()
        """Told by the transports what they read, for admission."""
        self._around: Surroundings | None = None
        self._gone = gone
        self._scheduler = scheduler
        self._started = False
        self._looking = asyncio.Lock()
        self._draining = False
        self._stopped = False

    async def start(self) -> None:
        """Load the newest version of every model. One that fails is told by ``index``, and ``ready`` is then False.

        Raises:
            StoreError: the repository cannot be read.
        """
        found = await asyncio.to_thread(self.repository.scan)
        self._known = found
        own = sum(not self.members_of(name) for name in found)  # those made of others compute nothing
        cores = max(1, this_host().usable_cores // max(own, 1))
        loop = asyncio.get_running_loop()
        self._around = Surroundings(
            loop=loop,
            clock_ns=self._clock_ns,
            cores=cores,
            cork=self.cork,
            turns=self.turns,
            bursts=Bursts(self.turns, self._scheduler),
            code=self._code,
            members=self,
            pace=Pace(lambda: self._started),
            offline=self._offline,
            gone=self._gone,
        )
        for name in found:
            self._family(name).expected = True  # all of them, before the first is loaded: ready means all
        for name in sorted(found, key=lambda name: bool(self.members_of(name))):  # those made of others last
            if self._families[name].routed is None:
                await self._try(found[name][newest(found[name])], name)
        self._started = True

    def members_of(self, name: str) -> tuple[str, ...]:
        """Give the names of the members of a deployment of the repository; of a model of its own there are none."""
        bundles = self._known.get(name.removesuffix(RAW) if name not in self._known else name)
        if not bundles:
            return ()
        try:
            composition = read_composition(bundles[newest(bundles)].path)
        except StoreError:  # told when it is loaded
            return ()
        return () if composition is None else tuple(member.name for member in composition.members)

    def submit(self, request: InferRequest, marks: Marks, done: Done) -> Ticket:
        """Take a request in; see ``Infers.submit``. ``done`` may be called before this returns."""
        if marks.trace is None:
            family = self._families.get(request.model)
            routed = None if family is None else family.routed
            if routed is not None and (not request.version or request.version == routed.version):
                return routed.submit(request, marks, done)
        else:
            marks.trace.of(request)
            ticket = self._submit(request, marks, partial(_ended, marks, done))
            return TracedTicket(ticket, marks)
        return self._submit(request, marks, done)

    def _submit(self, request: InferRequest, marks: Marks, done: Done) -> Ticket:
        family = self._families.get(request.model) or self._raw(request.model)
        try:
            if family is None:
                raise self._unknown(request.model)
            model = family.model(request.version or None)
        except ServeError as error:
            done(error)
            return REFUSED
        return model.submit(request, marks, done)

    def check_room(self, name: str, version: str | None, *, unless: Callable[[], bool] = lambda: False) -> None:
        """Refuse, before it is read, a request of the usual priority that would be refused if it had a single row.

        ``unless`` is asked only then, and lets it pass all the same.

        Raises:
            Overloaded: its queue is full, or its answer would come too late. It is counted as refused.
        """
        family = self._families.get(name)
        if family is not None and family.routed is not None and version in (None, family.routed.version):
            family.routed.check_room(unless)

    def shut(self, name: str, version: str | None) -> ServeError | None:
        """Say why a request of the usual priority would be refused, where that is known from the last one; else None.

        It looks at no queue, unlike ``check_room``, and counts nothing: who refuses one says so (``turned_away``).
        """
        family = self._families.get(name)
        routed = None if family is None else family.routed
        if routed is not None and (version is None or version == routed.version):
            return routed.shut()
        return None

    def turned_away(self, name: str, refused: ServeError) -> None:
        """Count a request that was refused before it was read, as ``shut`` said."""
        family = self._families.get(name)
        if family is not None and family.routed is not None:
            family.routed.statistics.failed(refused, spent_ns=0)

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer one request, for callers in this process. Raises ServeError."""
        waiter: asyncio.Future[InferResponse] = asyncio.get_running_loop().create_future()

        def done(outcome: InferResponse | ServeError) -> None:
            if waiter.done():
                return
            if isinstance(outcome, ServeError):
                waiter.set_exception(outcome)
            else:
                waiter.set_result(outcome)

        marks = Marks()
        marks.ns[0] = marks.ns[1] = marks.ns[2] = self._clock_ns()
        ticket = self.submit(request, marks, done)
        try:
            response = await waiter
        except asyncio.CancelledError:
            ticket.cancel()
            raise
        marks.ns[8] = marks.ns[9] = marks.ns[7]
        self.sent(response, marks)
        return response

    def sent(self, response: InferResponse, marks: Marks) -> None:
        """Count the phases of an answer that has gone out, all marks set."""
        if marks.trace is not None:
            end_trace(marks, response)
        if marks.counts is not None:
            marks.counts.sent(marks)

    def live(self) -> bool:
        """The service runs."""
        return not self._stopped

    def ready(self) -> bool:
        """Every model takes requests and has an instance to run them, and the service is not about to end.

        A model counts that was there at ``start`` or has served since, until it is unloaded: one that is added later
        and is still loading, or fails to, does not take the server out of rotation.
        """
        if self._draining or not self._families:
            return False
        return all(family.ready for family in self._families.values() if family.expected)

    def model_ready(self, name: str, version: str | None = None) -> bool:
        """Say whether a model takes requests. Raises ModelNotFound."""
        try:
            return not self._draining and self._model(name, version).ready
        except ModelNotReady:
            return False

    def metadata(self) -> ServerMetadata:
        """Give what a client may know of the server."""
        extensions = EXTENSIONS if self.shared_memory is None else (*EXTENSIONS, "system_shared_memory")
        return ServerMetadata(name="hasten", version=versions().get("hasten", "unknown"), extensions=extensions)

    def model_metadata(self, name: str, version: str | None = None) -> ModelMetadata:
        """Give what a client may know of a model. Raises ModelNotFound, ModelNotReady."""
        model = self._model(name, version)
        return model.metadata((model.version,), name)

    def takes_image(self, name: str) -> bool:
        """Say whether a model's only input is the file of an image. Raises ModelNotFound, ModelNotReady."""
        model = self._model(name, None)
        return model.name == name and model.takes_image  # under NAME.raw it takes what its steps make

    def config(self, name: str, version: str | None = None) -> dict[str, Json]:
        """Give a model's configuration, as the extension has it. Raises ModelNotFound, ModelNotReady."""
        return self._model(name, version).config(name)

    def statistics(self, name: str | None = None, version: str | None = None) -> dict[str, Json]:
        """Give ``model_stats`` of one model, or of all. Raises ModelNotFound, ModelNotReady."""
        models = self.models() if name is None else [self._model(name, version)]
        return {"model_stats": [model.statistics.json(model.name, model.version) for model in models]}

    def models(self) -> list[Version]:
        """Give the versions that are routed to."""
        return [family.routed for family in self._families.values() if family.routed is not None]

    def index(self, ready: bool = False) -> list[dict[str, Json]]:
        """Give every version that is known, with its state and why it is in it; with ``ready``, those that serve."""
        listed: list[dict[str, Json]] = []
        for name in sorted(self._known.keys() | self._families.keys()):
            family = self._families.get(name)
            routed = family.routed if family else None
            fates = family.fates if family else {}
            every = self._known.get(name, {}).keys() | fates.keys() | ({routed.version} if routed else set())
            for version in sorted(every):
                fate = fates.get(version)
                if routed is not None and routed.version == version:
                    unready = _unready(routed)
                    state, reason = ("UNAVAILABLE" if unready else "READY"), unready
                    if fate is not None and fate.state is State.FAILED:
                        reason = f"a newer bundle of it failed to load: {fate.reason}"
                elif fate is not None:
                    state = "UNAVAILABLE" if fate.state is State.FAILED else fate.state.value
                    reason = fate.reason
                else:
                    state, reason = "UNAVAILABLE", "not loaded"
                if not ready or state == "READY":
                    listed.append({"name": name, "version": version, "state": state, "reason": reason})
        return listed

    async def load(self, name: str, version: str | None = None) -> None:
        """Load a model's newest version, or the one named, from the repository as it is now, and route to it.

        Raises:
            ModelNotFound: it is not in the repository. ModelNotReady: why it failed to load.
        """
        found = await asyncio.to_thread(self.repository.scan)
        bundle = pick(found, name, version)
        kept = {known: other for known, other in self._known.get(name, {}).items() if known in found[name]}
        self._known[name] = kept | {bundle.version: bundle}  # others that are new are left for ``refresh`` to see
        await self._family(name).load(bundle)

    async def unload(self, name: str, *, dependents: bool = False) -> None:
        """Take a model out of service; what is inside is finished.

        With ``dependents`` its members go too, and theirs, once nothing is inside it: those that no other deployment
        asks. Raises ModelNotFound.
        """
        family = self._families.get(name)
        if family is None:
            raise self._unknown(name)
        members = {self._owner(member) for member in family.asks}
        await family.unload()
        if not dependents or not members:
            return
        await family.drained()
        asked = {self._owner(member) for other in self._families.values() for member in other.asks}
        for member in sorted(members - asked):
            with contextlib.suppress(ModelNotFound):  # it is unloaded already
                await self.unload(member, dependents=True)

    async def rollback(self, name: str) -> None:
        """Route to the version before. Raises ModelNotFound, ModelNotReady."""
        family = self._families.get(name)
        if family is None:
            raise self._unknown(name)
        await family.rollback()

    async def refresh(self, *, anew: bool = False) -> None:
        """Look at the repository again: load what is new or was written anew, unload what has gone.

        One after the other: who asks while another looks, waits and looks again. ``anew``: what could not be loaded is
        tried again even where nothing has changed.

        Raises:
            StoreError: the repository cannot be read, or nothing is in it any more; nothing is changed.
        """
        async with self._looking:
            await self._refresh(anew=anew)

    async def _refresh(self, *, anew: bool) -> None:
        found = await asyncio.to_thread(self.repository.scan, self._known)
        if self._known.keys() - found.keys():  # a bundle that is replaced is away for a moment
            await asyncio.sleep(AWAY_S)
            found = await asyncio.to_thread(self.repository.scan, self._known)
        if self._known and not found:
            raise StoreError(f"{self.repository.root} holds no deployment any more; unload a model by its name")
        before, self._known = self._known, found
        for name in before.keys() - found.keys():
            logger.warning("the model %s is gone from the repository, and is unloaded", name)
            if (family := self._families.get(name)) is not None:
                with contextlib.suppress(ModelNotFound):
                    await family.unload()
                if all(family.failed(version) for version in family.fates):
                    del self._families[name]
        changed = [name for name, bundles in found.items() if bundles != before.get(name)]
        failed = [name for name in found if name not in changed and self._failed(name, found)]
        tried = [*changed, *(name for name in failed if anew or (changed and self.members_of(name)))]
        for name in sorted(tried, key=lambda name: bool(self.members_of(name))):  # what a deployment asks before itself
            await self._try(found[name][newest(found[name])], name)

    async def follow(self, every_s: float = 2.0) -> None:
        """Refresh every ``every_s`` seconds until cancelled; what cannot be read is logged, and tried again."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.refresh()
            except StoreError as error:
                logger.warning("the watched folder was left as it was: %s", error)
            except Exception:
                logger.exception("the watched folder was left as it was")

    def drain(self) -> None:
        """Say from now on that the service is not ready; requests are still taken, versions are not loaded any more."""
        self._draining = True
        for family in self._families.values():
            family.end_loads()

    async def stop(self, drain_s: float = 30.0) -> bool:
        """Finish what is inside for at most ``drain_s`` and close; True if all was finished. Stopping twice is fine."""
        self.drain()
        finished, left = [], dict(self._families)
        while left:  # a deployment made of others before those that it asks
            asked = {self._owner(member) for family in left.values() for member in family.asks}
            layer = [left.pop(name) for name in [*left] if name not in asked] or [left.pop(name) for name in [*left]]
            finished += await asyncio.gather(*[family.close(drain_s) for family in layer])
        self._stopped = True
        if self.shared_memory is not None:
            self.shared_memory.unregister(None)
        if self.traces is not None:
            traces, self.traces = self.traces, None
            await asyncio.to_thread(traces.close)
        return all(finished)

    def _failed(self, name: str, found: Mapping[str, Mapping[str, Bundle]]) -> bool:
        """Say whether the newest version of a model could not be loaded."""
        family = self._families.get(name)
        return family is not None and family.failed(newest(found[name]))

    async def _try(self, bundle: Bundle, name: str) -> None:
        try:
            await self._family(name).load(bundle)
        except ModelNotReady as error:  # its family keeps the reason, and ``index`` tells it
            logger.warning("%s", error)

    def _family(self, name: str) -> Family:
        if self._around is None:
            raise ModelNotReady("the service was not started yet")
        family = self._families.setdefault(name, Family(name, self._around, self._refit))
        if self._draining:
            family.end_loads()
        return family

    def _refit(self) -> None:
        """Have those made of others look at their members, of which one is another now or has gone."""
        for version in self.models():
            if isinstance(version, Composed):
                version.refit()

    def _owner(self, member: str) -> str:
        """Give the name of the deployment that a member comes with."""
        return member if member in self._families else member.removesuffix(RAW)

    def _raw(self, name: str) -> Family | None:
        """Give the model that is served without its steps under ``NAME.raw``, where its deployment says so."""
        if not name.endswith(RAW):
            return None
        family = self._families.get(name.removesuffix(RAW))
        routed = None if family is None else family.routed
        return family if routed is not None and routed.has_raw else None

    def _model(self, name: str, version: str | None) -> Version:
        family = self._families.get(name) or self._raw(name)
        if family is None:
            raise self._unknown(name)
        return family.model(version)

    def _unknown(self, name: str) -> ServeError:
        if self._stopped:
            return Cancelled("the server has ended")
        if name in self._known:
            return ModelNotReady(f"model {name!r} is not loaded")
        return ModelNotFound(f"no model is called {name[:128]!r} here")
