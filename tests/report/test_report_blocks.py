import io

import pytest
from rich.console import Console
from rich.text import Text

from hasten.report.blocks import Blocks

NAMES = ("latency", "over\nfirst", "size")
ROWS = [
    (Text("a plan"), ("1.00 ms\n[0.99, 1.01]", "2.00x\n[1.98, 2.02]", "1.00 MB")),
    (Text("b"), ("2.00 ms", "–", "–")),
]


def drawn(width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(Blocks(NAMES, ROWS))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_values_of_one_column_end_below_each_other() -> None:
    lines = drawn(60)
    ends = {line.index(text) + len(text) for line in lines for text in ("1.00 ms", "2.00 ms") if text in line}
    assert len(ends) == 1
    assert next(line for line in lines if "latency" in line).endswith("size"), "one-line names stand at the bottom"


def test_columns_stand_further_apart_where_there_is_room() -> None:
    assert max(map(len, drawn(34))) < max(map(len, drawn(60)))
    assert max(map(len, drawn(60))) == max(map(len, drawn(200)))


@pytest.mark.parametrize("width", [13, 20, 30, 40, 80])
def test_a_narrow_terminal_moves_columns_down_and_cuts_none(width: int) -> None:
    lines = drawn(width)
    text = "\n".join(lines)
    for piece in ("1.00 ms", "[0.99, 1.01]", "2.00x", "[1.98, 2.02]", "1.00 MB", "latency", "size"):
        assert piece in text
    assert all(len(line) <= width for line in lines)
