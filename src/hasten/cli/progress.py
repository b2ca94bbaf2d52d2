"""What a search says of itself while it runs, on standard error: a live display, or lines where nobody watches."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from hasten.isolation import Progress
from hasten.report import format as fmt
from hasten.search.events import Event, Listener
from hasten.search.result import Trial

LOG_EVERY_S = 10.0
"""How often a log gets a line about one long piece of work."""


@dataclass
class Display:
    """What is known of a search by now: fed with events, drawn whenever rich asks."""

    title: str
    budget_s: float | None
    start: float = field(default_factory=time.monotonic)
    stage: str = "start"
    doing: str = "reading the model and the samples"
    step: str = ""
    share: float | None = None
    best: Trial | None = None
    left_s: float | None = None
    left_at: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    spinner: Spinner = field(default_factory=lambda: Spinner("dots"))

    def take(self, event: Event) -> None:
        """Learn from an event."""
        self.stage, self.best = event.stage, event.best or self.best
        if event.left_s is not None:
            self.left_s, self.left_at = event.left_s, time.monotonic()
        if event.kind == "trial-end" and event.trial:
            self.counts[event.trial.outcome] += 1
        if event.kind in ("trial-start", "stage"):
            self.doing, self.share, self.step = event.text, None, ""
        if event.kind == "progress":
            self.step, self.share = event.text, event.share

    def __rich__(self) -> RenderableType:
        """Draw it: what runs, the best so far, how long is left, what was tried."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="ellipsis", no_wrap=True)
        grid.add_row("now", Text.assemble((f"{self.stage}  ", "cyan"), self.doing))
        if self.step:
            grid.add_row("", Text(self.step, style="dim"))
        if self.share is not None:
            grid.add_row("", ProgressBar(total=1.0, completed=self.share, width=40))
        grid.add_row("best", best_line(self.best))
        grid.add_row("tried", tried_line(self.counts))
        grid.add_row("time", self._time())
        self.spinner.update(text=Text(self.title, style="bold"))
        return Group(self.spinner, grid)

    def _time(self) -> Text:
        now = time.monotonic()
        text = Text(f"{fmt.seconds(now - self.start)} so far")
        if self.left_s is not None:
            left = max(0.0, self.left_s - (now - self.left_at))
            text.append(f", {left_text(left, budget_s=self.budget_s)}")
        return text


@contextlib.contextmanager
def showing(title: str, *, budget_s: float | None = None, console: Console | None = None) -> Iterator[Listener]:
    """Show a search on standard error while the block runs. Gives the listener to feed."""
    screen = console or Console(stderr=True, highlight=False)
    if not screen.is_terminal:
        yield lambda event: print_line(event, screen, budget_s=budget_s)
        return
    display = Display(title=title, budget_s=budget_s)

    def listen(event: Event) -> None:
        display.take(event)
        if event.kind == "note":
            live.console.print(Text(f"  {event.text}", style="dim"))

    with Live(display, console=screen, refresh_per_second=4, transient=True) as live:
        yield listen


@contextlib.contextmanager
def telling(title: str, *, console: Console | None = None) -> Iterator[Progress]:
    """Show one long piece of work on standard error while the block runs. Gives what to call with its progress."""
    screen = console or Console(stderr=True, highlight=False)
    if not screen.is_terminal:
        told = time.monotonic()

        def line(text: str, share: float | None) -> None:
            nonlocal told
            if time.monotonic() - told >= LOG_EVERY_S:
                told = time.monotonic()
                screen.print(Text(f"{text}{'' if share is None else f' ({share:.0%})'}"), soft_wrap=True)

        yield line
        return
    with Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeRemainingColumn(),
        console=screen,
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=1.0)

        def draw(text: str, share: float | None) -> None:
            bar.update(task, description=f"{title}  {text}", completed=share or 0.0)

        yield draw


def print_line(event: Event, screen: Console, *, budget_s: float | None = None) -> None:
    """Print what a log should keep: stages, finished trials, notes; not every step of progress."""
    if event.kind in ("stage", "trial-end", "note"):
        known = event.left_s is not None and event.kind == "stage"
        left = f" ({left_text(event.left_s or 0.0, budget_s=budget_s)})" if known else ""
        screen.print(Text(f"[{event.stage}] {event.text}{left}"), soft_wrap=True)


def left_text(left_s: float, *, budget_s: float | None) -> str:
    """Write the time that is left: with a budget it is the most there can be, without one it is a guess."""
    if budget_s is None:
        return f"about {fmt.roughly(left_s)} left" if left_s > 0 else "longer than guessed"
    return f"at most {fmt.seconds(left_s)} left" if left_s > 0 else "finishing"


def best_line(best: Trial | None) -> Text:
    """Write the best trial so far."""
    if best is None or best.measurement is None:
        return Text("none yet", style="dim")
    measured = best.measurement
    text = Text.assemble(
        (fmt.duration(measured.latency.median_ns), "bold green"), f"  {fmt.times(measured.speedup)} over untouched"
    )
    if measured.quality:
        text.append(f", drop {fmt.drop(measured.quality.drop)}")
    return text.append(f"\n{best.plan}", style="dim")


def tried_line(counts: Counter[str]) -> Text:
    """Write how many trials are done, and what came of them."""
    total = sum(counts.values())
    parts = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
    return Text(f"{total} ({parts})" if total else "0")
