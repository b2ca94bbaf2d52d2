"""The versions of one model: which one is routed to, and how another takes its place without a pause.

absent -> loading -> ready -> draining -> gone | failed. A new version is loaded and warmed beside the old one, answers
the probes, and only then gets the requests, in one assignment; the old one finishes what is inside. If anything fails,
the old one stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from hasten.composition import read_composition
from hasten.errors import HastenError, ModelNotFound, ModelNotReady, ServeError, Untrusted
from hasten.serve.composed import Composed, stands_in
from hasten.serve.model import Model
from hasten.serve.reading import read_bundle
from hasten.serve.repository import Bundle, restamped
from hasten.serve.state import State
from hasten.serve.surroundings import Surroundings
from hasten.serve.warm import Warm
from hasten.tensors import relative_error

logger = logging.getLogger(__name__)

DRAIN_S = 30.0
"""How long an old version may take to finish what is inside."""


KEPT_FATES = 8
"""Versions that were unloaded are told this far back; a server that is swapped for months must not keep them all."""

Version = Model | Composed
"""A version that is alive: of a model of its own, or of a deployment made of others."""


@dataclass(frozen=True)
class Fate:
    """What became of a version that is not routed to: its state, and why."""

    state: State
    reason: str = ""


class Family:
    """One model's versions. On the event loop's thread alone; loads and unloads happen one after the other.

    ``rerouted`` is called whenever requests go to another version from then on, or to none.
    """

    def __init__(self, name: str, around: Surroundings, rerouted: Callable[[], object] = lambda: None) -> None:
        self.name = name
        self.routed: Version | None = None
        self.fates: dict[str, Fate] = {}
        """By version, of those that are not routed to."""
        self.expected = False
        """It shall serve: the server is not ready while it does not."""
        self.change: float | None = None
        """Largest relative difference between the answers of the routed version and of the one before."""
        self._before: Bundle | None = None
        self._preparing: asyncio.Task[tuple[Version, float | None]] | None = None
        self._ending = False
        self._around = around
        self._turn = asyncio.Lock()
        self._draining: dict[asyncio.Task[bool], Version] = {}
        self._rerouted = rerouted

    def failed(self, version: str) -> bool:
        """Say whether a version was to be loaded and could not be."""
        fate = self.fates.get(version)
        return fate is not None and fate.state is State.FAILED

    @property
    def ready(self) -> bool:
        """It has a version that takes requests."""
        return self.routed is not None and self.routed.ready

    @property
    def asks(self) -> set[str]:
        """The names of the members that its versions ask, those that drain too."""
        alive = (self.routed, *self._draining.values())
        return {member.name for each in alive if isinstance(each, Composed) for member in each.composition.members}

    def model(self, version: str | None = None) -> Version:
        """Give the version that is routed to.

        Raises:
            ModelNotFound: another version was asked for, and was never here. ModelNotReady: there is none just now.
        """
        routed = self.routed
        if routed is not None and version in (None, routed.version):
            return routed
        shown = version or max(self.fates, default=None)
        fate = self.fates.get(shown) if shown else None
        if fate is None:
            have = routed.version if routed else "none"
            raise ModelNotFound(f"model {self.name!r} has no version {str(version)[:128]!r}; it serves {have}")
        why = f": {fate.reason}" if fate.reason else ""
        raise ModelNotReady(f"version {shown} of model {self.name!r} is {fate.state.name.lower()}{why}")

    async def load(self, bundle: Bundle) -> None:
        """Load a version and route to it; nothing happens where a model is routed to already.

        Raises:
            ModelNotReady: why it failed; what was routed to before still is.
        """
        async with self._turn:
            if self._ending:
                raise ModelNotReady(f"model {self.name!r} is not loaded any more: the server is ending")
            old = self.routed
            if isinstance(old, Model) and old.bundle == bundle and old.ready:
                return  # one made of others is fitted to its members anew, and one whose workers are gone is mended
            if old is None or old.version != bundle.version:
                self.fates[bundle.version] = Fate(State.LOADING)
            try:
                self._preparing = self._around.loop.create_task(self._prepared(bundle, old))
                fresh, change = await self._preparing
            except asyncio.CancelledError:
                self._fail(bundle, "its load was cancelled")
                if self._ending:
                    raise ModelNotReady(f"model {self.name!r} was not loaded: the server is ending") from None
                raise
            except Exception as error:  # whatever it is, the version must not stay one that is being loaded
                if not isinstance(error, HastenError):
                    logger.exception("version %s of model %r failed to load", bundle.version, self.name)
                reason = str(error) if isinstance(error, HastenError) else f"{type(error).__name__}: {error}"
                self._fail(bundle, reason)
                kept = f"; version {old.version} stays" if old else ""
                raise ModelNotReady(
                    f"version {bundle.version} of model {self.name!r} failed to load: {reason}{kept}"
                ) from error
            self.change = change
            self.expected = True
            self.routed = fresh  # from here on every request goes to the new one
            self._rerouted()
            self.fates.pop(bundle.version, None)
            if old is not None:
                self._before = old.bundle if old.bundle != bundle else self._before
                self._retire(old)

    async def unload(self) -> None:
        """Route nowhere, and finish what is inside; one that failed to load is not waited for any more.

        Raises:
            ModelNotFound: nothing is loaded, and nothing was to be.
        """
        async with self._turn:
            old, expected = self.routed, self.expected
            self.expected = False
            if old is None and expected:
                return
            if old is None:
                raise ModelNotFound(f"model {self.name!r} is not loaded")
            self.routed = None
            self._rerouted()
            self._before = old.bundle
            self._retire(old)

    async def drained(self) -> bool:
        """Wait for the versions that are not routed to any more; True if all that was inside was finished."""
        return all(await asyncio.gather(*self._draining))

    async def rollback(self) -> None:
        """Route to the version before.

        Raises:
            ModelNotFound: there is none, or it was overwritten. ModelNotReady: it cannot be loaded any more.
        """
        before = self._before
        if before is None:
            raise ModelNotFound(f"model {self.name!r} has no version before this one")
        if restamped(before) not in (before, None):
            raise ModelNotFound(
                f"what model {self.name!r} served before this was overwritten: {before.path} is another bundle now; "
                "give each version a folder of its own"
            )
        await self.load(before)

    def end_loads(self) -> None:
        """Give up a load that is under way, and refuse those to come: the server is about to end."""
        self._ending = True
        if self._preparing is not None:
            self._preparing.cancel()

    async def close(self, limit_s: float) -> bool:
        """End everything; True if all that was inside was finished."""
        self.end_loads()
        async with self._turn:
            old, self.routed = self.routed, None
            if old is not None:
                self._retire(old, limit_s)
            return await self.drained()

    async def _prepared(self, bundle: Bundle, old: Version | None) -> tuple[Version, float | None]:
        await self._around.pace.pause()  # the repository was read just now
        composition = await asyncio.to_thread(read_composition, bundle.path)
        if composition is not None:
            composed = Composed(bundle, composition, self._around)
            await composed.load()
            try:
                _check_stands_in(composed, old)
            except Untrusted:
                composed.fail()
                raise
            return composed, None
        read = await asyncio.to_thread(read_bundle, bundle, self._around.code, self._around.pace)
        fresh = Model(bundle, read, self._around)
        try:
            warm = await fresh.load()
            await self._around.pace.pause()
            _check_stands_in(fresh, old)
            change = await _compared(fresh, warm, old) if isinstance(old, Model) else None
            await self._around.pace.pause()
            return fresh, change
        except BaseException:  # also where the one who asked for it has left
            fresh.fail()
            raise

    def _fail(self, bundle: Bundle, reason: str) -> None:
        if self.routed is None or self.routed.bundle != bundle:  # else it is what stays, and says itself how it is
            self.fates[bundle.version] = Fate(State.FAILED, reason)

    def _retire(self, old: Version, limit_s: float = DRAIN_S) -> None:
        if self.routed is None or self.routed.version != old.version:
            self.fates[old.version] = Fate(State.DRAINING)
        task = self._around.loop.create_task(old.drain(limit_s))
        self._draining[task] = old
        task.add_done_callback(lambda ended: self._gone(old, ended))

    def _gone(self, old: Version, task: asyncio.Task[bool]) -> None:
        self._draining.pop(task, None)
        if self.fates.get(old.version) == Fate(State.DRAINING):
            self.fates[old.version] = Fate(State.GONE, "unloaded")
        gone = [version for version, fate in self.fates.items() if fate.state is State.GONE]
        for version in gone[:-KEPT_FATES]:
            del self.fates[version]
        self._around.loop.call_soon(self._around.gone)  # the task holds the version until this callback has returned


def _check_stands_in(fresh: Version, old: Version | None) -> None:
    """Check that clients of the old version can go on. Raises Untrusted: its tensors are others."""
    if old is None or (isinstance(old, Composed) and not old.fits):  # who does not fit has no clients to break
        return
    if not stands_in(fresh.metadata(()), old.metadata(())):
        raise Untrusted(f"its tensors are not those of version {old.version}; unload that one first")


async def _compared(fresh: Model, warm: Warm, old: Model) -> float | None:
    """Give how far the new version's answers to its probes lie from the old one's.

    Raises:
        Untrusted: its answers changed by more than the deployment allows.
    """
    limit = fresh.read.deployment.serving.max_change
    if _shapes(old) != _shapes(fresh):  # behind steps, or with an axis that is open now: no client is the worse for it
        if limit is not None:
            raise Untrusted(
                f"its model takes other tensors than version {old.version}, so nothing can say that answers changed by "
                f"at most {limit:.2g}; leave max_change out, or unload that one first"
            )
        return None
    try:
        before = await old.answers(warm.probes)
    except ServeError:
        return None  # the old one cannot answer: no reason to keep it
    own = {name: array for name, array in warm.answers.items() if array.dtype.kind in "fiub"}
    change = max((relative_error(before[name], array) for name, array in own.items()), default=0.0)
    if limit is not None and change > limit:
        raise Untrusted(f"its answers differ from version {old.version} by {change:.2g} (allowed: {limit:.2g})")
    return change


def _shapes(model: Model) -> list[tuple[str, str, tuple[int | str, ...]]]:
    signature = model.read.artifact.signature
    return [(spec.name, spec.dtype, spec.shape[1:]) for spec in (*signature.inputs, *signature.outputs)]
