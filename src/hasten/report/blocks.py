"""Rows whose name is too long for a column: it stands over its numbers, which stay aligned from row to row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

NARROWEST, WIDEST = 1, 5
"""Columns of space between two numbers, as the terminal has room."""


@dataclass(frozen=True)
class Blocks:
    """A table of ``names``, one a column, and ``rows``: a title, and a cell a column.

    A cell may have several lines; the first is its value, the others step back. Columns stand apart as far as the
    terminal is wide; those for which it is too narrow go below the others, under their own names.
    """

    names: Sequence[str]
    rows: Sequence[tuple[Text, Sequence[str]]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw it for a terminal's width."""
        widths = [
            max(len(line) for text in (name, *(cells[i] for _, cells in self.rows)) for line in text.split("\n"))
            for i, name in enumerate(self.names)
        ]
        parts = _parts(widths, options.max_width)
        gap = min(_gap([widths[i] for i in part], options.max_width) for part in parts)
        if len(parts) == 1:
            yield _line([Text(name, style="dim") for name in self.names], widths, gap, bottom=True)
        for number, (title, cells) in enumerate(self.rows):
            if number:
                yield Text()
            yield title
            for part in parts:
                if len(parts) > 1:
                    yield _line([Text(self.names[i], style="dim") for i in part], [widths[i] for i in part], gap)
                yield _line([_two_tone(cells[i]) for i in part], [widths[i] for i in part], gap)


def over_interval(text: str) -> str:
    """Put an interval under its value."""
    return text.replace(" [", "\n[", 1)


def _parts(widths: Sequence[int], room: int) -> list[list[int]]:
    """Divide the columns, in their order, into as few lines as the room allows."""
    parts: list[list[int]] = [[]]
    used = 0
    for i, width in enumerate(widths):
        more = width + (NARROWEST if parts[-1] else 0)
        if parts[-1] and used + more > room:
            parts.append([])
            used, more = 0, width
        parts[-1].append(i)
        used += more
    return parts


def _gap(widths: Sequence[int], room: int) -> int:
    spare = (room - sum(widths)) // max(1, len(widths) - 1)
    return max(NARROWEST, min(WIDEST, spare))


def _line(cells: Sequence[Text], widths: Sequence[int], gap: int, *, bottom: bool = False) -> Table:
    table = Table.grid(padding=(0, 0))
    for i, width in enumerate(widths):
        space = gap if i else 0
        table.add_column(justify="right", min_width=width + space, no_wrap=True, vertical="bottom" if bottom else "top")
    table.add_row(*cells)
    return table


def _two_tone(text: str) -> Text:
    value, newline, rest = text.partition("\n")
    return Text(value).append(newline + rest, style="dim")
