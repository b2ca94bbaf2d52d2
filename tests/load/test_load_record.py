"""Runs on disk: what is written is read, what is damaged is said, what is large is not taken into memory."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import fields
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.errors import StoreError
from hasten.load.record import RUN, read_run, write_run
from hasten.load.run import LoadRun
from load.runs import run_of


def same(a: LoadRun, b: LoadRun) -> bool:
    columns = all(
        np.array_equal(getattr(a.requests, field.name), getattr(b.requests, field.name)) for field in fields(a.requests)
    )
    return columns and all(getattr(a, f.name) == getattr(b, f.name) for f in fields(a) if f.name != "requests")


@given(
    times=st.lists(st.integers(0, 10**12), max_size=40),
    cut=st.none() | st.text(max_size=20),
    version=st.none() | st.text(max_size=5),
)
def test_what_is_written_is_read(times: list[int], cut: str | None, version: str | None, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("run")
    run = run_of(times, cut_short=cut, version=version, duration_s=1.0, conditions={"load": {"average": 0.5}})
    write_run(run, folder)
    assert same(read_run(folder), run)


def test_a_run_that_is_written_over_another_leaves_nothing_of_it(tmp_path: Path) -> None:
    write_run(run_of([1, 2, 3]), tmp_path)
    write_run(run_of([4, 5]), tmp_path)
    assert read_run(tmp_path).requests.latency_ns.tolist() == [4, 5]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_interrupted_writing_leaves_the_run_before(tmp_path: Path) -> None:
    write_run(run_of([1, 2, 3]), tmp_path)
    (tmp_path / "requests-000000000000.npz").write_bytes(b"half")  # the columns of a run whose run.json never came
    assert read_run(tmp_path).requests.latency_ns.tolist() == [1, 2, 3]


def test_a_folder_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no run of load"):
        read_run(tmp_path)


def columns_of(folder: Path) -> Path:
    (found,) = folder.glob("*.npz")
    return found


def rewritten(folder: Path, **changes: object) -> None:
    told = msgspec.json.decode((folder / RUN).read_bytes())
    (folder / RUN).write_bytes(msgspec.json.encode({**told, **changes}))


def test_columns_that_are_not_what_the_record_says_are_refused(tmp_path: Path) -> None:
    write_run(run_of([1, 2, 3]), tmp_path)
    data = bytearray(columns_of(tmp_path).read_bytes())
    data[len(data) // 2] ^= 1
    columns_of(tmp_path).write_bytes(data)
    with pytest.raises(StoreError, match=r"not what run\.json says"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"requests": -1}, "damaged"),
        ({"requests": 10**12}, "damaged"),
        ({"columns": "../other.npz"}, "damaged"),
        ({"columns": "gone.npz"}, "cannot be read"),
        ({"requests": 2}, "must be int64"),
        ({"outcomes": ["ok"]}, "another version"),
        ({"seed": "three"}, "cannot be read"),
        ({"surprise": 1}, "cannot be read"),
    ],
)
def test_a_damaged_record_is_one_line(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    write_run(run_of([1, 2, 3]), tmp_path)
    rewritten(tmp_path, **changes)
    with pytest.raises(StoreError, match=said):
        read_run(tmp_path)


def test_columns_that_grow_when_they_are_unpacked_are_refused(tmp_path: Path) -> None:
    write_run(run_of([1, 2, 3]), tmp_path)
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scheduled_ns.npy", bytes(50_000_000))
    columns_of(tmp_path).write_bytes(held.getvalue())
    rewritten(tmp_path, sha256=hashlib.sha256(held.getvalue()).hexdigest())
    with pytest.raises(StoreError, match=r"too many for 3 requests|larger than 3 requests"):
        read_run(tmp_path)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    write_run(run_of([1, 2, 3]), tmp_path)
    held = io.BytesIO()
    np.savez(held, scheduled_ns=np.array([{}, {}, {}], object), allow_pickle=True)
    columns_of(tmp_path).write_bytes(held.getvalue())
    rewritten(tmp_path, sha256=hashlib.sha256(held.getvalue()).hexdigest())
    with pytest.raises(StoreError, match="cannot be read"):
        read_run(tmp_path)
