"""A realistic result of a search, made without running one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from hasten.host import Host, Load
from hasten.measurement import (
    Bound,
    Conditions,
    Estimate,
    Latency,
    Limit,
    Measurement,
    OperatorBound,
    Quality,
    Ratio,
    Resources,
)
from hasten.plan import Part, Plan
from hasten.search.compression import Cell, Compression, Curve, CurvePoint, Prediction
from hasten.search.result import Certificate, Goal, Result, Trial, Verdict, Word
from hasten.tensors import Signature, TensorSpec

HOST = Host(
    cpu="Imaginary 9000 2-Core Processor",
    flags=("avx2", "avx512f", "avx512_vnni"),
    cores=2,
    quota=2.0,
    memory_bytes=16 << 30,
    system="Linux 6.1 x86_64",
)
CONDITIONS = Conditions(
    host=HOST,
    load=Load(load_average=1.25, steal_share=0.002, clock_mhz=3250.0),
    threads=2,
    batch=1,
    versions={"hasten": "0.1.0", "onnxruntime": "1.31.1", "python": "3.11.9"},
    started="2026-03-01T12:00:00Z",
)
SIGNATURE = Signature(
    (TensorSpec("image", "float32", ("batch", 1, 32, 32)),), (TensorSpec("logits", "float32", ("batch", 10)),)
)
ORIGINAL_NS = 2.4e6
LABELS: tuple[Limit, ...] = ("compute", "memory", "overhead")


def make_bound(measured_ns: float, *, operators: int = 24, seed: int = 0) -> Bound:
    random = np.random.default_rng(seed)
    shares = random.dirichlet(np.full(operators, 0.7)) * 0.93
    found = []
    for i, share in enumerate(shares):
        time_ns = float(share * measured_ns)
        limit = LABELS[0 if i % 3 else 1 + (i // 3) % 2]
        efficiency = 0.15 if limit == "overhead" else float(random.uniform(0.3, 0.9))
        found.append(
            OperatorBound(
                name=f"/blocks/{i}/conv",
                kind="Conv" if i % 3 else "Add",
                dtype="float32",
                operations=1e6 * (i + 1),
                bytes=1e4 * (i + 1),
                bound_ns=time_ns * efficiency,
                time_ns=time_ns,
                limit=limit,
            )
        )
    grouped = sum(op.bound_ns for op in found)
    return Bound(
        strict_ns=grouped * 0.9,
        grouped_ns=grouped,
        winograd_ns=grouped * 0.6,
        measured_ns=measured_ns,
        outside_ns=measured_ns - sum(op.time_ns or 0.0 for op in found),
        operators=tuple(found),
        unpriced=("TopK",),
    )


def make_measurement(
    latency_ns: float, *, drop: float | None = None, size: int = 2_300_000, seed: int = 0
) -> Measurement:
    random = np.random.default_rng(seed)
    slices = tuple(float(latency_ns * f) for f in np.exp(random.normal(0, 0.01, 41)))
    ratio = ORIGINAL_NS / latency_ns
    return Measurement(
        latency=Latency(
            median_ns=latency_ns,
            p90_ns=latency_ns * 1.05,
            p99_ns=latency_ns * 1.2,
            runs=2000,
            slices_ns=slices,
            first_run_ns=latency_ns * 4,
            settled=True,
        ),
        speedup=Ratio(value=ratio, low=ratio * 0.99, high=ratio * 1.01, n=41, settled=True),
        resources=Resources(file_bytes=size, load_ns=3e7, rss_bytes=size * 5, peak_rss_bytes=size * 7),
        conditions=CONDITIONS,
        signature=SIGNATURE,
        quality=None if drop is None else make_quality(drop),
        bound=make_bound(latency_ns, seed=seed),
    )


def make_quality(drop: float, *, n: int = 250) -> Quality:
    half = 0.004 if drop else 0.0
    return Quality(
        metric="accuracy",
        higher_is_better=True,
        reference=0.984,
        value=0.984 - drop,
        drop=Estimate(value=drop, low=drop - half, high=drop + half, n=n),
        flip_rate=abs(drop) * 1.5,
        disagreement=abs(drop) * 1.5,
        worst_class=("8", drop * 3),
    )


def make_trial(
    plan: Plan, latency_ns: float, *, drop: float = 0.0, stage: str = "engines", size: int = 2_300_000
) -> Trial:
    seed = int(plan.key[:6], 16)
    return Trial(
        plan=plan,
        stage=stage,
        outcome="measured",
        seconds=3.2,
        artifact="ab" * 32,
        measurement=make_measurement(latency_ns, drop=drop, size=size, seed=seed),
        traits=("int8",) if drop else (),
    )


def engine(name: str, **settings: object) -> Plan:
    return Plan(Part(name, dict(settings)))


def make_result(run: Path, *, word: Word = "MEETS", extra: int = 0, note: str | None = None) -> Result:
    """A search on a two-core host: ``extra`` more int8 trials crowd the chart; ``note`` goes into a plan's name."""
    original = engine("onnxruntime", threads=2)
    lossless = engine("openvino", threads=2).with_passes(Part("fold"), Part("fuse"))
    int8 = Part("quantize-static", {"observer": "mse", "exclude": ["/stem/conv", "/head/gemm", "/blocks/0/conv"]})
    chosen = engine("openvino", threads=2, **({"note": note} if note else {})).with_passes(Part("fold"), int8)
    mild = engine("onnxruntime", threads=2).with_passes(Part("fold"), int8)
    trials = [
        make_trial(original, ORIGINAL_NS),
        make_trial(engine("onnxruntime", threads=1), 3.9e6),
        make_trial(engine("openvino", threads=2), 2.1e6),
        make_trial(engine("openvino", threads=1), 3.4e6),
        make_trial(lossless, 1.9e6, stage="lossless"),
        make_trial(chosen, 0.82e6, drop=0.003, stage="int8", size=640_000),
        make_trial(mild, 1.1e6, drop=0.002, stage="int8", size=660_000),
    ]
    random = np.random.default_rng(3)
    for i in range(extra):
        part = Part("quantize-static", {"observer": "percentile", "percentile": 99 + i / 100})
        plan = engine("onnxruntime", threads=1 + i % 2).with_passes(Part("fold"), part)
        latency = float(random.uniform(0.9e6, 2.6e6))
        trials.append(make_trial(plan, latency, drop=float(random.uniform(0, 0.02)), stage="int8", size=650_000))
    trials += [
        Trial(
            plan=engine("openvino", precision="bfloat16", threads=2),
            stage="precision",
            outcome="unsupported",
            seconds=0.4,
            reason="openvino: this processor has no bfloat16",
        ),
        Trial(
            plan=engine("onnxruntime", threads=2).with_passes(Part("quantize-dynamic")),
            stage="int8",
            outcome="failed",
            seconds=12.0,
            reason="run: the child process died of SIGSEGV; its last line: <script>alert(1)</script>",
        ),
        Trial(
            plan=engine("onnxruntime", threads=1).with_passes(int8),
            stage="int8",
            outcome="skipped",
            seconds=0.0,
            reason="its bound of 1.9 ms is above the best so far, 0.82 ms",
        ),
    ]
    certificates = tuple(
        Certificate(
            plan=plan.key,
            quality=None if plan == original else make_quality(drop, n=500),
            over_original=ratio_to(ORIGINAL_NS, ns),
            over_lossless=ratio_to(1.9e6, ns),
            measurement=make_measurement(ns, seed=i),
        )
        for i, (plan, ns, drop) in enumerate(
            [(chosen, 0.82e6, 0.003), (mild, 1.1e6, 0.002), (lossless, 1.9e6, 0.0), (original, ORIGINAL_NS, 0.0)]
        )
    )
    sentences = {"MEETS": "2.93 times faster than the original, and it loses at most 0.7 % accuracy (allowed: 1 %)."}
    return Result(
        id="20260301-120000-abcdef",
        run=run,
        source="cd" * 32,
        source_name="digits.onnx",
        goal=Goal(max_drop=0.01, p99_ns=5e6),
        metric="accuracy",
        trials=tuple(trials),
        frontier=(chosen.key, mild.key, lossless.key, original.key),
        original=original.key,
        best_lossless=lossless.key,
        chosen=chosen.key,
        certificates=certificates,
        verdict=Verdict(
            word=word,
            sentence=sentences.get(word, "With 500 samples the drop may be 2.1 %, and 1 % is allowed."),
            more_samples=900 if word == "UNPROVEN" else None,
        ),
        twin=Ratio(value=1.001, low=0.996, high=1.006, n=41, settled=True),
        fallen={},
        splits={"calibrate": 250, "search": 250, "certify": 500},
        deployment=run / "deployment.toml",
        seconds=104.0,
        conditions=CONDITIONS,
    )


def ratio_to(baseline_ns: float, ns: float) -> Ratio:
    value = baseline_ns / ns
    return Ratio(value=value, low=value * 0.99, high=value * 1.01, n=41, settled=True)


FOLD, FUSE = Part("fold"), Part("fuse")
PRUNE = Part("prune-channels", {"widths": {"/blocks/0/conv1": 32, "/blocks/1/conv1": 16}, "importance": "taylor"})
TUNE = Part("finetune", {"epochs": 8})
INT8 = Part("quantize-static", {"observer": "mse", "through": True})
AWARE = Part("finetune", {"epochs": 4, "lr": 1e-4})
COMPRESSED = (PRUNE, TUNE, FOLD, FUSE, INT8, AWARE)
GROUPS = {"/stem/conv": 16, **{f"/blocks/{i}/conv1": 64 for i in range(6)}, "/blocks/6/conv1": 128}


def make_compressed(run: Path, *, note: str | None = None, groups: dict[str, int] = GROUPS) -> Result:
    """A result whose chosen plan was pruned, trained, quantized and trained again; ``note`` gets into every name.

    Measured between the untouched model and the chosen plan: the engine, fold, fold and fuse, all up to fuse, and all
    up to quantizing. What pruning and training brought one by one, no trial tells.
    """
    base = make_result(run)
    settings = {"threads": 2} | ({"note": note} if note else {})
    on = engine("openvino", **settings)
    trials = [
        make_trial(on, 2.1e6),
        make_trial(on.with_passes(FOLD), 1.95e6, stage="lossless"),
        make_trial(on.with_passes(FOLD, FUSE), 1.9e6, stage="lossless"),
        make_trial(on.with_passes(*COMPRESSED[:4]), 1.05e6, drop=0.004, size=1_400_000, stage="prune"),
        make_trial(on.with_passes(*COMPRESSED[:5]), 0.46e6, drop=0.011, size=390_000, stage="prune"),
        make_trial(on.with_passes(*COMPRESSED), 0.47e6, drop=0.003, size=390_000, stage="train"),
    ]
    known = {trial.key for trial in trials}
    chosen = trials[-1].key
    certificate = Certificate(
        plan=chosen,
        quality=make_quality(0.005, n=500),
        over_original=ratio_to(ORIGINAL_NS, 0.48e6),
        over_lossless=ratio_to(1.9e6, 0.48e6),
        measurement=make_measurement(0.48e6, seed=9),
    )
    trials = [*(trial for trial in base.trials if trial.key not in known), *trials]
    return replace(
        base,
        trials=tuple(trials),
        chosen=chosen,
        frontier=(chosen, *base.frontier),
        certificates=(certificate, *base.certificates),
        compression=make_compression(trials, note or "", groups),
    )


def make_compression(trials: list[Trial], note: str, groups: dict[str, int]) -> Compression:
    """The first group is the most sensitive, the last the least; ten plans were predicted, eight of them built."""
    cells = [
        Cell(
            group=group + note,
            units=units,
            size=size,
            kl=3.0 * 0.4**i * (1 - units / size) ** 2 + (1e-4 if units == size else 0.0),
            metric=0.984 - 0.2 * 0.5**i * (1 - units / size),
            ns=2.1e6 - 2e5 * (1 - units / size),
        )
        for i, (group, size) in enumerate(groups.items())
        for units in range(8, size + 1, 8)
    ]
    predictions = [
        Prediction(
            plan=trials[-1 - i].key if i < 3 else f"{i:016x}",
            first_ns=(0.5 + 0.15 * i) * 1e6 * 1.2,
            refitted_ns=(0.5 + 0.15 * i) * 1e6 * (1.05 if i % 2 else 0.95),
            measured_ns=(0.5 + 0.15 * i) * 1e6 if i < 8 else None,
            sensitivity=0.9 * 0.6**i,
        )
        for i in range(10)
    ]
    curves = [
        Curve(
            plan=trials[-1 - plan].key,
            step=step,
            epochs=tuple(
                CurvePoint(number=n, loss=scale / n**0.8, held=scale * (1.15 / n**0.7 + 0.01 * max(0, n - 6)))
                for n in range(1, 9)
            ),
            stopped=f"no better for 2 epochs{note}" if scale == 0.4 else None,
        )
        for plan, step, scale in [(0, "finetune 2", 1.2), (0, "finetune 6", 0.4), (1, "finetune 2", 1.3)]
    ]
    return Compression(cells=tuple(cells), predictions=tuple(predictions), curves=tuple(curves))
