import io
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from hasten.cli.progress import Display, left_text, showing
from hasten.plan import Part, Plan
from hasten.search.events import Event
from hasten.search.result import Trial

TRIAL = Trial(plan=Plan(Part("onnxruntime")), stage="sweep", outcome="failed", seconds=1.0, reason="it died")


@dataclass
class Screen:
    """A console that keeps what it was given."""

    terminal: bool

    def __post_init__(self) -> None:
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=self.terminal, width=100)

    @property
    def text(self) -> str:
        return self.file.getvalue()


def event(kind: Any, text: str, **more: Any) -> Event:
    return Event(kind=kind, stage="sweep", text=text, **more)


def test_where_nobody_watches_stages_trials_and_notes_are_lines() -> None:
    screen = Screen(terminal=False)
    with showing("a model", console=screen.console) as listener:
        listener(event("stage", "engines", left_s=100.0))
        listener(event("progress", "block 3", share=0.3))
        listener(event("trial-end", "onnxruntime: failed", trial=TRIAL))
    assert screen.text.splitlines() == ["[sweep] engines (about 2 min left)", "[sweep] onnxruntime: failed"]


def test_the_display_says_what_runs_what_was_tried_and_how_long_is_left() -> None:
    display = Display(title="a model", budget_s=60.0)
    display.take(event("trial-start", "onnxruntime(threads=2)", left_s=42.0))
    display.take(event("progress", "block 3", share=0.3))
    display.take(event("trial-end", "failed", trial=TRIAL))
    screen = Screen(terminal=True)
    screen.console.print(display)
    for piece in ("onnxruntime(threads=2)", "block 3", "none yet", "1 (1 failed)", "left"):
        assert piece in screen.text


def test_a_new_trial_forgets_the_step_of_the_one_before() -> None:
    display = Display(title="a model", budget_s=None)
    display.take(event("progress", "block 3", share=0.3))
    display.take(event("trial-start", "openvino"))
    assert (display.step, display.share, display.doing) == ("", None, "openvino")


def test_the_time_left_is_the_most_with_a_budget_and_a_guess_without_one() -> None:
    assert left_text(131.0, budget_s=300.0) == "at most 2 min 11 s left"
    assert left_text(131.0, budget_s=None) == "about 2 min left"
    assert left_text(0.0, budget_s=300.0) == "finishing"
    assert left_text(0.0, budget_s=None) == "longer than guessed"


def test_a_log_of_a_search_with_a_budget_says_at_most() -> None:
    screen = Screen(terminal=False)
    with showing("a model", budget_s=300.0, console=screen.console) as listener:
        listener(event("stage", "engines", left_s=100.0))
    assert screen.text == "[sweep] engines (at most 1 min 40 s left)\n"
