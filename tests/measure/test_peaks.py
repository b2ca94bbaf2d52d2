"""Peaks: measured in a child process, kept, and honest about what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from hasten.errors import InvalidSetting
from hasten.host import this_host
from hasten.isolation import Limits, run_isolated
from hasten.measure import peaks
from hasten.measure.probes import probes


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, peaks.Peaks]:
    """Peaks of one thread, with little patience: how good the numbers are is not what is tested."""
    home = tmp_path_factory.mktemp("home")
    return home, peaks.measure_peaks(1, home=home)


def test_peaks_are_positive_and_of_this_host(kept) -> None:
    _, found = kept
    assert found.threads == 1
    assert found.fingerprint == this_host().fingerprint
    assert found.operations_per_s["int8"] >= found.operations_per_s["float32"] > 1e9
    assert ("bfloat16" in found.operations_per_s) <= any("bf16" in flag for flag in this_host().flags)


def test_bandwidth_falls_from_the_caches_to_memory(kept) -> None:
    _, found = kept
    rates = [rate for _, rate in sorted(found.cached_bytes_per_s.items())]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] >= found.bytes_per_s > 1e8


def test_kept_peaks_are_used_again_and_only_while_they_hold(kept, monkeypatch: pytest.MonkeyPatch) -> None:
    home, found = kept
    calls = []

    def nothing_runs(target: str, **settings: object) -> object:
        calls.append(target)
        return {"operations_per_s": {"float32": 1.0}, "bytes_per_s": [[1, 1.0], [4, 1.0]]}

    monkeypatch.setattr(peaks, "run_isolated", nothing_runs)
    assert peaks.measure_peaks(1, home=home) == found
    assert calls == []
    monkeypatch.setattr(peaks, "versions", lambda: {"numpy": "0"})
    assert peaks.measure_peaks(1, home=home).bytes_per_s == 1.0
    assert "hasten.measure.peaks:measure" in calls


def test_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "peaks.json"
    path.write_text("{")
    assert peaks._read(path) is None


def test_more_threads_than_processors_are_refused() -> None:
    with pytest.raises(InvalidSetting, match="threads = 4096"):
        peaks.measure_peaks(4096)


def test_threads_share_the_data(kept) -> None:
    del kept
    found = peaks.measure(threads=2, amounts=[1 << 14, 1 << 16])
    assert [amount for amount, _ in found["bytes_per_s"]] == [1 << 14, 1 << 16]
    assert all(rate > 0 for _, rate in found["bytes_per_s"])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_probes_are_valid_models_that_count_their_products(dtype: str) -> None:
    found = list(probes(dtype))
    for probe in found:
        onnx.checker.check_model(probe.model, full_check=True)
        assert probe.feed["x"].dtype == (np.uint8 if dtype == "int8" else np.float32)
    assert found[1].operations == 2 * 1024**3
    assert found[-1].operations == 2 * 64 * 64 * 9 * 54 * 54


def test_an_engine_measures_only_what_it_has() -> None:
    found = run_isolated(peaks.PROBES["onnxruntime"], limits=Limits(cpus=(0,)), threads=1, dtypes=["bfloat16"])
    assert found == {"operations_per_s": {}}
