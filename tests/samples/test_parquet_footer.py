"""A Parquet file's rows, from its footer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from arro3.core import Array, RecordBatch, Table
from arro3.io import write_parquet
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.samples.parquet_footer import footer_rows


def written(path: Path, rows: int, columns: int = 3) -> Path:
    batch = {f"c{at}": Array.from_numpy(np.arange(rows, dtype=np.float32)) for at in range(columns)}
    write_parquet(Table.from_batches([RecordBatch.from_pydict(batch)]), path, max_row_group_size=64)
    return path


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (63, 3), (1000, 40)])
def test_the_footer_tells_the_rows(tmp_path: Path, rows: int, columns: int) -> None:
    assert footer_rows(written(tmp_path / "a.parquet", rows, columns)) == rows


@settings(max_examples=100)
@given(st.binary(max_size=80))
def test_any_footer_gives_a_number_or_none(footer: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
        found = footer_rows(path)
    assert found is None or found >= 0
