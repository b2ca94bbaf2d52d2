"""An analysis of a service in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as Drawn
from rich.text import Text

from hasten.analyse.analysis import Analysis
from hasten.report.service import Table, summary, tables_of

WORDS = {"MEETS": "bold green", "MISSES": "bold red", "INCONCLUSIVE": "bold yellow", "INVALID": "bold red"}


def service_table(analysis: Analysis) -> RenderableType:
    """Draw the whole analysis."""
    first, *lines = summary(analysis)
    parts: list[RenderableType] = [Text(first, style="bold")]
    parts += [Padding(_line(line), (0, 1)) for line in lines]
    for table in tables_of(analysis):
        parts += [Text(), drawn(table)]
    return Group(*parts)


def drawn(table: Table) -> RenderableType:
    """Draw one table with its title over it and what it holds below."""
    grid = Drawn(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for k, name in enumerate(table.columns):
        wide = k == 0 or name in ("for example", "it", "")
        grid.add_column(name, justify="left" if wide else "right", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(cell) for cell in row))
    about = [Padding(Text(table.about, style="dim"), (0, 1))] if table.about else []
    return Group(Text(table.title, style="bold"), grid, *about)


def _line(line: str) -> Text:
    word = line.partition(":")[0]
    return Text(line, style=WORDS.get(word, ""))
