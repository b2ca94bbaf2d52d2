"""Requests as OpenTelemetry spans: one for the request, with its phases as children, made once it has ended.

Nothing is measured for it: the marks that every request has are told again, so a trace agrees with ``Server-Timing``
and the metrics. Sampling is the SDK's (``OTEL_TRACES_SAMPLER``); the SDK's own thread sends spans in batches, and drops
what its queue does not hold.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from time import perf_counter_ns, time_ns
from urllib.parse import urlsplit

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from hasten.errors import BadInput, ServeError
from hasten.protocol.messages import InferRequest, InferResponse
from hasten.protocol.phases import PHASES
from hasten.serve.ticket import Marks

PROPAGATOR = TraceContextTextMapPropagator()
CARRIED = ("traceparent", "tracestate")


class OtelTraces:
    """Makes spans with a provider's tracer; see ``traces.Traces``."""

    def __init__(
        self,
        provider: TracerProvider,
        *,
        clock_ns: Callable[[], int] = perf_counter_ns,
        wall_ns: Callable[[], int] = time_ns,
    ) -> None:
        self._provider = provider
        self._clock_ns = clock_ns
        self._wall_ns = wall_ns
        self.tracer = provider.get_tracer("hasten")

    def start(self, headers: Mapping[bytes, bytes], began_ns: int) -> OtelTrace:
        """Begin a span, below the client's where it names one."""
        carried = {name: headers[key].decode("latin-1") for name in CARRIED if (key := name.encode()) in headers}
        parent = PROPAGATOR.extract(carried) if carried else otel_context.Context()
        # The marks count from an unknown point: what a second is on the wall is looked up anew for each request.
        behind_ns = self._wall_ns() - self._clock_ns()
        span = self.tracer.start_span("inference", parent, kind=trace.SpanKind.SERVER, start_time=began_ns + behind_ns)
        return OtelTrace(self.tracer, span, behind_ns)

    def close(self) -> None:
        """Send what was noted."""
        self._provider.shutdown()


class OtelTrace:
    """One request's span; see ``traces.Trace``."""

    __slots__ = ("_behind_ns", "_ended", "_span", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: trace.Span, behind_ns: int) -> None:
        self._tracer = tracer
        self._span = span
        self._behind_ns = behind_ns
        self._ended = False

    @property
    def header(self) -> bytes:
        """The request's ``traceparent``."""
        own = self._span.get_span_context()
        return f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}".encode()

    def of(self, request: InferRequest) -> None:
        """Note the model."""
        if self._span.is_recording():
            self._span.update_name(f"inference {request.model[:128]}")
            self._span.set_attribute("hasten.model", request.model[:128])
            self._span.set_attribute("hasten.request_id", request.id[:128])

    def end(self, marks: Marks, outcome: InferResponse | ServeError) -> None:
        """End the span where the last mark is, with a child for every phase that took place."""
        if self._ended:
            return
        self._ended = True
        if not self._span.is_recording():
            self._span.end()
            return
        if isinstance(outcome, ServeError):
            self._span.set_status(trace.Status(trace.StatusCode.ERROR, str(outcome)[:1000]))
            self._span.set_attribute("error.type", outcome.reason)
            end_ns = max(*marks.ns, marks.ns[0])
            if not any(marks.ns[3:]):
                end_ns = perf_counter_ns()
        else:
            self._span.set_attribute("hasten.version", outcome.version)
            self._span.set_attribute("hasten.batch_rows", marks.rows)
            self._span.set_attribute("hasten.instance", marks.instance)
            end_ns = max(marks.ns)
        self._phases(marks)
        self._span.end(end_ns + self._behind_ns)

    def _phases(self, marks: Marks) -> None:
        below = trace.set_span_in_context(self._span, otel_context.Context())
        reached = [(name, ns) for name, ns in zip((*PHASES, ""), marks.ns, strict=True) if ns]
        for (name, begin_ns), (_, end_ns) in itertools.pairwise(reached):
            child = self._tracer.start_span(name, below, start_time=begin_ns + self._behind_ns)
            child.end(max(begin_ns, end_ns) + self._behind_ns)


def open_traces(endpoint: str | None) -> OtelTraces:
    """Send spans to a collector over OTLP/HTTP; None: to where the environment says (``OTEL_EXPORTER_OTLP_...``).

    Raises:
        BadInput: the endpoint is no address.
    """
    if endpoint is not None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"--otel {endpoint!r} is no address of a collector; write http://HOST:4318")
        if parts.path in ("", "/"):
            endpoint = f"{endpoint.rstrip('/')}/v1/traces"
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "hasten"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return OtelTraces(provider)
