"""Trials and certificates with figures of one's choice."""

from hasten.host import Load, this_host
from hasten.measurement import Conditions, Estimate, Latency, Measurement, Quality, Ratio, Resources
from hasten.plan import Part, Plan
from hasten.search.result import Certificate, Trial
from hasten.tensors import Signature, TensorSpec

CONDITIONS = Conditions(
    host=this_host(),
    load=Load(load_average=0.5, steal_share=0.0, clock_mhz=None),
    threads=1,
    batch=1,
    versions={"python": "3.11"},
    started="2026-01-01T00:00:00+00:00",
)
SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 2)),))


def ratio(value, width=0.01):
    """Make a ratio whose interval is ``width`` wide to each side."""
    return Ratio(value=value, low=value - width, high=value + width, n=10, settled=width <= 0.02)


def judged(drop, *, half=0.002, n=1000, disagreement=0.01):
    """Make a quality of accuracy."""
    return Quality(
        metric="accuracy",
        higher_is_better=True,
        reference=0.95,
        value=0.95 - drop,
        drop=Estimate(value=drop, low=drop - half, high=drop + half, n=n),
        flip_rate=disagreement,
        disagreement=disagreement,
    )


def measurement(speed, quality, *, latency_ms=10.0, width=0.01, runs=1000, misses=None):
    """Make a measurement of a plan ``speed`` times as fast as one of ``latency_ms``."""
    median = latency_ms * 1e6 / speed
    return Measurement(
        latency=Latency(
            median_ns=median,
            p90_ns=median * 1.1,
            p99_ns=median * 1.2,
            runs=runs,
            slices_ns=(median,) * 10,
            first_run_ns=median * 3,
            settled=True,
            misses=misses,
        ),
        speedup=ratio(speed, width),
        resources=Resources(file_bytes=1000, load_ns=1e6, rss_bytes=10**6, peak_rss_bytes=2 * 10**6),
        conditions=CONDITIONS,
        signature=SIGNATURE,
        quality=quality,
    )


def trial(speed, drop, *, passes=0, mark=0, traits=(), skeleton=None):
    """Make a measured trial; ``mark`` tells plans of the same shape apart."""
    names = ("fold", "fuse", "quantize-static", "quantize-dynamic")[:passes]
    settings = {"threads": 1} if not mark else {"threads": 1, "batch": mark}
    plan = Plan(Part("onnxruntime", settings), tuple(Part(name) for name in names))
    return Trial(
        plan=plan, stage="sweep", outcome="measured", seconds=1.0, artifact=f"a{mark}", traits=traits,
        skeleton=skeleton,
        measurement=measurement(speed, judged(drop)),
    )  # fmt: skip


def certificate(key, speed, quality=None, **figures):
    """Make a finalist's certificate."""
    return Certificate(
        plan=key,
        quality=quality,
        over_original=ratio(speed, figures.get("width", 0.01)),
        over_lossless=ratio(speed),
        measurement=measurement(speed, quality, **figures),
    )


ORIGINAL = trial(1.0, 0.0)
