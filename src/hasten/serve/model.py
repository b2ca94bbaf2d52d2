"""One version of a model, alive: it is loaded, takes requests, and goes. It knows its signature, not its siblings."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from hasten.artifact import Json
from hasten.engine import CPU, device_of
from hasten.errors import BadRequest, HastenError, ModelNotReady, ServeError, ServerFault, TooLarge
from hasten.protocol.messages import NAMES, InferRequest, InferResponse, ModelMetadata, Tensor, TensorMetadata
from hasten.serve.admission import Asked, Limits
from hasten.serve.batching import NEVER, Batcher
from hasten.serve.call import Call, Piece
from hasten.serve.child import ALIGN, ChildRunner, input_bytes
from hasten.serve.costs import CostCurve
from hasten.serve.intake import Intake, TakenIn, batch_axis, opened
from hasten.serve.line import Line
from hasten.serve.news import Ran
from hasten.serve.piping import Piping, Served, Stations
from hasten.serve.pool import Pool, Seen, Work
from hasten.serve.reading import Read, offline
from hasten.serve.repository import Bundle
from hasten.serve.runner import LocalRunner, Outputs, Runner
from hasten.serve.state import State
from hasten.serve.statistics import Statistics
from hasten.serve.surroundings import Surroundings
from hasten.serve.ticket import REFUSED, Done, Marks, Ticket
from hasten.serve.warm import Warm, Warming, warm
from hasten.serve.worker import Instance
from hasten.steps.pipeline import Pipeline
from hasten.tensors import DTYPES, Array, Feed, Signature

DEFAULT_SIZES = (1, 2, 4, 8)
GPU_SIZES = (1, 4, 16, 64)
"""A small network takes a GPU hardly longer for 16 rows than for one, and each size costs it memory
(docs/decisions/0011)."""

GPU_BYTES = 64 << 20
"""Of the inputs of a batch on a GPU: of large rows there are fewer, where nothing is said."""

GPU_INSTANCES = 2
"""While one's run is computed, the other's rows are joined and brought there."""

READY: Final = State.READY
"""Asked of each request: a name of this module costs less than an attribute of another's class."""

MOST_RUNS = 1024
"""Of one request: to cut it takes some microseconds a run, on the event loop."""

END_S = 5.0
"""How long the instances may take to end once nothing is inside."""


class Model:
    """A version that was read. ``await load()`` before the first ``submit``; on the event loop's thread alone."""

    def __init__(self, bundle: Bundle, read: Read, around: Surroundings) -> None:
        self.name = bundle.name
        self.version = bundle.version
        self.bundle = bundle
        self.read = read = offline(read) if around.offline else read
        self.statistics = Statistics()
        self.state = State.LOADING
        self._around = around
        self._clock_ns = around.clock_ns
        serving, signature = read.deployment.serving, read.artifact.signature
        self._axis = batch_axis(signature, read.deployment.batch)
        self.sizes = _sizes(read, self._axis)
        objective_ms = serving.objective_ms or read.deployment.p99_ms
        self._objective_ns = None if objective_ms is None else int(objective_ms * 1e6)
        self._timeout_ns = None if serving.timeout_ms is None else int(serving.timeout_ms * 1e6)
        self._intake = Intake(signature, self._axis)
        self._priority = serving.priority
        largest = self.sizes[-1] if self._axis is not None else 1
        self._most_rows = max(MOST_RUNS * largest, serving.queue_rows)
        isolated = serving.isolation == "process"
        self._slot_bytes = input_bytes(read.deployment, read.artifact, self.sizes[-1]) if isolated else None
        self._kinds = kinds_of(signature)
        batcher: Batcher[Piece] = Batcher(CostCurve(self.sizes), waits=self._objective_ns is not None)
        self.line: Line[Instance] = Line(batcher, around.clock_ns)
        seen = Seen(ran=self._ran, restarted=self._restarted)
        self.pool = Pool(self._work(), self.line, seen=seen, around=around)
        self._piping = self._with_steps(read.pipeline) if read.pipeline else None

    async def load(self) -> Warm:
        """Open, warm and check the instances; give what the first one found.

        Raises:
            HastenError: why it cannot serve; it is ``FAILED`` then.
        """
        try:
            found = await self.pool.start()
        except HastenError:
            self.state = State.FAILED
            raise
        first = found[0]
        with self.line.lock:
            for size, ns in first.costs.items():
                self.line.batcher.costs.update(size, ns)
            self.line.batcher.costs.ns(1)  # worked out before the instances ask
        self.state = READY
        return first

    @property
    def ready(self) -> bool:
        """It takes requests, and has an instance to run them."""
        if self.state is READY:
            self.pool.look(self._clock_ns())
        return self.state is READY and self.pool.ready > 0

    def submit(self, request: InferRequest, marks: Marks, done: Done) -> Ticket:
        """Take a request in; see ``Infers.submit``."""
        if self._piping is not None and request.model == self.name:
            return self._piping.submit(request, marks, done)
        now_ns = self._clock_ns()
        if not marks.ns[2]:
            marks.ns[2] = now_ns
        priority = request.priority or self._priority
        gate = self.pool.gate
        refused = None if gate.is_open else gate.shut(priority, now_ns)
        if refused is not None and not request.timeout_us and self.state is READY:
            self.statistics.failed(refused, spent_ns=now_ns - marks.ns[2])
            done(refused)
            return REFUSED
        call = Call(request, marks, done, priority, self._finish)
        if self.state is not READY:
            call.fail(ModelNotReady(f"version {self.version} of model {self.name!r} is {self.state.name.lower()}"))
            return call
        try:
            taken = self._intake.take(request)
        except BadRequest as error:
            call.fail(error)
            return call
        self._enter(call, taken, now_ns)
        return call

    def check_room(self, unless: Callable[[], bool]) -> None:
        """Refuse a request that was not read yet; see ``Service.check_room``. Raises Overloaded."""
        if self._piping is not None or self.state is not READY or not self.line.batcher.rows:
            return
        asked = Asked(rows=1, n_bytes=0, priority=self.read.deployment.serving.priority)
        refused = self.pool.refused(asked, self._clock_ns())
        if refused is not None and not unless():
            self.statistics.failed(refused, spent_ns=0)
            raise refused

    def shut(self) -> ServeError | None:
        """Say why a request that was not read yet would be refused, where that is known; see ``Service.shut``."""
        gate = self.pool.gate
        if gate.is_open or self._piping is not None or self.state is not READY:
            return None
        return gate.shut(self._priority, self._clock_ns())

    def _enter(self, call: Call, taken: TakenIn, now_ns: int) -> None:
        """Let a call with what it brings wait for its run, or fail it."""
        if taken.rows > self._most_rows or self._slot_bytes is not None:
            try:
                self._check_size(taken)
            except TooLarge as error:
                call.fail(error)
                return
        call.rows = taken.rows
        due_ns = deadline_ns = NEVER
        if self._objective_ns is not None or self._timeout_ns is not None or call.request.timeout_us:
            due_ns, deadline_ns = self._times_ns(call)
        refused = self.pool.admit(call, taken.n_bytes, deadline_ns, now_ns)
        if refused is not None:
            call.fail(refused)
            return
        call.divide(taken, self.sizes[-1])
        if due_ns != NEVER or deadline_ns != NEVER:
            for piece in call.pieces:
                piece.due_ns, piece.deadline_ns = due_ns, deadline_ns
        self.pool.submit(call, now_ns)

    async def answers(self, feed: Feed) -> Outputs:
        """Run a feed of our own, past admission, as if it were a request. Raises ServeError."""
        waiter: asyncio.Future[Outputs] = self._around.loop.create_future()

        def finish(call: Call, outcome: Outputs | ServeError) -> None:
            self.pool.ended(call)
            if waiter.done():
                return
            if isinstance(outcome, ServeError):
                waiter.set_exception(outcome)
            else:
                waiter.set_result(outcome)

        now_ns = self._clock_ns()
        marks = Marks()
        marks.ns[2] = now_ns
        rows = 1 if self._axis is None else len(next(iter(feed.values())))
        request = InferRequest(model=self.name, inputs=())
        call = Call(request, marks, lambda outcome: None, 1, finish)
        n_bytes = sum([array.nbytes for array in feed.values()])
        call.divide(TakenIn(feed, rows, "probes", n_bytes), self.sizes[-1])
        self.pool.submit(call, now_ns)
        return await waiter

    async def drain(self, limit_s: float) -> bool:
        """Take no more requests, finish those inside for at most ``limit_s``, then close; True if all were finished."""
        if self.state is READY:
            self.state = State.DRAINING
        try:
            await asyncio.wait_for(self._emptied(), limit_s)
            finished = True
        except TimeoutError:
            finished = False
        self._close()
        try:
            await asyncio.wait_for(self.pool.over(), END_S)
        except TimeoutError:
            finished = False  # a run goes on: its thread is a daemon, and ends with the process
        if self.state is State.DRAINING:
            self.state = State.GONE
        return finished

    def fail(self) -> None:
        """It was loaded, and is not good enough: close it."""
        self.state = State.FAILED
        self._close()

    async def _emptied(self) -> None:
        if self._piping is not None:
            await self._piping.emptied()
        await self.pool.emptied()

    def _close(self) -> None:
        if self._piping is not None:
            self._piping.close()
        self.pool.close()

    @property
    def inside(self) -> int:
        """Requests that have not ended."""
        return self.pool.calls if self._piping is None else max(self._piping.inside, self.pool.calls)

    @property
    def instances(self) -> int:
        """Runs that may go on at once."""
        return self.pool.work.instances

    @property
    def takes_image(self) -> bool:
        """Its only input is the file of an image."""
        pipeline = self.read.pipeline
        return pipeline is not None and {spec.name for spec in pipeline.signature.inputs} == pipeline.images

    @property
    def has_raw(self) -> bool:
        """It is served without its steps too."""
        return self.read.deployment.raw and self.read.pipeline is not None

    @property
    def signature(self) -> Signature:
        """What a client gives and gets under its own name."""
        return self.read.pipeline.signature if self.read.pipeline else self.read.artifact.signature

    def metadata(self, versions: tuple[str, ...], name: str | None = None) -> ModelMetadata:
        """Give what a client may know; under ``NAME.raw``, of the model without its steps."""
        signature = self.signature if name in (None, self.name) else self.read.artifact.signature
        return ModelMetadata(
            name=name or self.name,
            versions=versions,
            platform=f"hasten_{self.read.deployment.engine}",
            inputs=tuple(self._described(spec.name, spec.dtype, spec.shape) for spec in signature.inputs),
            outputs=tuple(self._described(spec.name, spec.dtype, spec.shape) for spec in signature.outputs),
        )

    def config(self, name: str | None = None) -> dict[str, Json]:
        """Give the configuration as Triton's extension has it: without the batch axis where there is one."""
        signature = self.read.artifact.signature
        batched = self._axis is not None

        def listed(tensor: TensorMetadata) -> dict[str, Json]:
            dims = tensor.shape[1:] if batched else tensor.shape
            return {"name": tensor.name, "data_type": f"TYPE_{_triton(tensor.datatype)}", "dims": list(dims)}

        about = self.metadata((self.version,), name)
        config: dict[str, Json] = {
            "name": about.name,
            "platform": about.platform,
            "backend": self.read.deployment.engine,
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": self.sizes[-1] if batched else 0,
            "input": [listed(tensor) for tensor in about.inputs],
            "output": [listed(tensor) for tensor in about.outputs],
            "instance_group": [{"name": about.name, "count": self.pool.work.instances, **self._place()}],
            "parameters": {"batch_axis": {"string_value": str(signature.inputs[0].shape[0])}} if batched else {},
        }
        if batched:
            config["dynamic_batching"] = {"preferred_batch_size": list(self.sizes)}
        return config

    def _place(self) -> dict[str, Json]:
        if device_of(self.read.engine) == CPU:
            return {"kind": "KIND_CPU"}
        return {"kind": "KIND_GPU", "gpus": [0]}

    def _check_size(self, taken: TakenIn) -> None:
        """Check that a request is not too many runs, and that a full batch of such rows fits a child's memory.

        Raises:
            TooLarge: it is, or it does not: one large request must not fail its batch, nor hold up the loop.
        """
        if taken.rows > self._most_rows:
            raise TooLarge(
                f"the request has {taken.rows} rows; at most {self._most_rows} are taken at once: send it in parts"
            )
        limit = self._slot_bytes
        if limit is None:
            return
        largest = self.sizes[-1] if self._axis is not None else 1
        needed = sum(-(-array.nbytes // taken.rows) * largest + ALIGN for array in taken.feed.values())
        if needed > limit:
            raise TooLarge(
                f"a batch of such rows takes {needed} bytes, and a worker's slot has {limit} for its inputs; the "
                "deployment's serving.slot_bytes makes it larger"
            )

    def _times_ns(self, call: Call) -> tuple[int, int]:
        """Say when the answer is wanted, and when it becomes useless."""
        timeout_ns, objective_ns, arrived_ns = self._time_ns(call.request), self._objective_ns, call.marks.ns[2]
        return (
            NEVER if objective_ns is None else arrived_ns + objective_ns,
            NEVER if timeout_ns is None else arrived_ns + timeout_ns,
        )

    def _time_ns(self, request: InferRequest) -> int | None:
        """Give the time after its arrival from which an answer is of no use, or None."""
        if request.timeout_us:
            return min(request.timeout_us * 1000, self._timeout_ns or NEVER)
        return self._timeout_ns

    def _finish(self, call: Call, outcome: Outputs | ServeError) -> None:
        self.pool.ended(call)
        self._answer(call, outcome, self._kinds)

    def _answer(self, call: Call, outcome: Outputs | ServeError, kinds: Mapping[str, str]) -> None:
        """End a call: count it, and tell its client unless that has left."""
        marks = call.marks
        marks.ns[7] = self._clock_ns()
        if isinstance(outcome, ServeError):
            self.statistics.failed(outcome, spent_ns=marks.ns[7] - marks.ns[2])
            if outcome.reason != "cancelled":
                call.done(outcome)
            return
        try:
            response = self._response(call.request, outcome, kinds)
        except BadRequest as error:  # texts that are none in UTF-8, which the model or its last step made
            fault = ServerFault(str(error))
            self.statistics.failed(fault, spent_ns=marks.ns[7] - marks.ns[2])
            call.done(fault)
            return
        self.statistics.answered(marks, call.rows)
        call.done(response)

    def _response(self, request: InferRequest, outputs: Outputs, kinds: Mapping[str, str]) -> InferResponse:
        names = [output.name for output in request.outputs] if request.outputs else kinds
        tensors: tuple[Tensor, ...] = ()
        for name in names:
            tensors += (_tensor(name, kinds[name], outputs[name]),)
        return InferResponse(model=request.model, version=self.version, outputs=tensors, id=request.id)

    def _ran(self, ran: Ran) -> None:
        batch, joined_ns, ended_ns = ran.batch, ran.joined_ns, ran.ended_ns
        output_ns = self._clock_ns() - ended_ns
        self.statistics.ran(batch.rows, batch.size, joined_ns - batch.closed_ns, ended_ns - joined_ns, output_ns)

    def _restarted(self) -> None:
        self.statistics.restarts += 1

    def _with_steps(self, pipeline: Pipeline) -> Piping:
        kinds = kinds_of(pipeline.signature)
        stations = Stations(
            taken=lambda: self.state is READY,
            enter=self._enter,
            left=self.pool.ended,
            answer=lambda call, outcome: self._answer(call, outcome, kinds),
            refused=partial(self.pool.refused, keeps=False),  # it comes to the model after its steps
            time_ns=self._time_ns,
        )
        model = Served(name=self.name, version=self.version, serving=self.read.deployment.serving)
        intake = Intake(opened(self.read.artifact.signature), self._axis)
        return Piping(model, pipeline, intake=intake, stations=stations, around=self._around)

    def _work(self) -> Work:
        read, serving = self.read, self.read.deployment.serving
        warming = Warming(
            signature=read.artifact.signature,
            axis=self._axis,
            sizes=self.sizes,
            golden=read.golden,
            precision=read.engine.precision,
            clock_ns=self._clock_ns,
            pace=self._around.pace,
        )
        wait_ms = serving.objective_ms
        return Work(
            name=self.name,
            open_runner=lambda: _open(read, max(self.sizes)),
            prepare=lambda runner: warm(runner, warming),
            instances=serving.instances or _instances(read, self._around.cores),
            limits=Limits(
                rows=serving.queue_rows,
                n_bytes=serving.queue_bytes,
                concurrency=serving.concurrency,
                wait_ns=None if wait_ms is None else int(wait_ms * 1e6),
            ),
            run_limit_ns=int(serving.run_limit_ms * 1e6),
            limit_ns=min([ns for ns in (self._objective_ns, self._timeout_ns) if ns is not None], default=None),
            batched=self._axis is not None,
            inline=serving.isolation == "auto" and self._is_fixed() and device_of(read.engine) == CPU,
        )

    def _is_fixed(self) -> bool:
        """Say whether rows alone are open: t(n) then tells what any run costs."""
        specs = self.read.artifact.signature.inputs
        return self._axis is not None and all(isinstance(dim, int) for spec in specs for dim in spec.shape[1:])

    def _described(self, name: str, dtype: str, shape: tuple[int | str, ...]) -> TensorMetadata:
        lengths = tuple(dim if isinstance(dim, int) else -1 for dim in shape)
        if isinstance(self._axis, int):
            lengths = (-1, *lengths[1:])
        return TensorMetadata(name=name, datatype=NAMES[dtype], shape=lengths)


def kinds_of(signature: Signature) -> dict[str, str]:
    """Give the protocol's datatype of each output."""
    return {spec.name: NAMES[spec.dtype] for spec in signature.outputs}


def _tensor(name: str, kind: str, data: Array) -> Tensor:
    return Tensor.of(name, data) if kind == "BYTES" else Tensor(name=name, datatype=kind, data=data)


def _open(read: Read, largest: int) -> Runner:
    if read.deployment.serving.isolation == "process":
        return ChildRunner.start(read.deployment, read.artifact, largest=largest)
    return LocalRunner(read.engine.open(read.artifact))


def _instances(read: Read, cores: int) -> int:
    """Give how many sessions run at once where the deployment does not say it: what a processor's cores take."""
    return max(1, cores // read.engine.threads) if device_of(read.engine) == CPU else GPU_INSTANCES


def _sizes(read: Read, axis: str | int | None) -> tuple[int, ...]:
    if axis is None:
        return (1,)
    if isinstance(axis, int):
        return (axis,)
    return tuple(sorted({*(read.deployment.serving.batch_sizes or (*usual_sizes(read), read.deployment.batch))}))


def usual_sizes(read: Read) -> tuple[int, ...]:
    """Give the batch sizes of a model whose deployment names none."""
    rows = [spec.shape[1:] for spec in read.artifact.signature.inputs]
    if device_of(read.engine) == CPU or not all(isinstance(dim, int) for row in rows for dim in row):
        return DEFAULT_SIZES
    row_bytes = sum(
        math.prod(int(dim) for dim in spec.shape[1:]) * DTYPES[spec.dtype].itemsize
        for spec in read.artifact.signature.inputs
    )
    return tuple(size for size in GPU_SIZES if size == 1 or size * row_bytes <= GPU_BYTES)


def _triton(datatype: str) -> str:
    return "STRING" if datatype == "BYTES" else datatype
