"""The command line: finds the verb, prints its answer, turns errors into one line and an exit code.

0: done. 1: an error, in one line. 2: the command itself is wrong. 3: done, but the goal was not met. 4: done, but what
was measured does not decide. 130: stopped. 143: told to end while it began, as process 1.

What takes long to import is imported once it is needed: ``main`` has to run first.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hasten.cli.standard_output import apart
from hasten.errors import BadInput, HastenError, UsageError

if TYPE_CHECKING:
    from cyclopts import App

    from hasten.cli.answer import Answer

VERBS = {
    "optimize": "Find the fastest form of a model that keeps the goal, prove it, and make it ready to deploy.",
    "report": "Show a finished run: the frontier, the verdict, the page.",
    "demo": "Run the main job on a model and data that come with hasten.",
    "inspect": "Show a model: signature, operators, what they cost, and this machine's limit for each.",
    "measure": "Time a model in one engine, or in several side by side.",
    "apply": "Apply passes to a model and write the changed model.",
    "import": "Bring a model into the store, checked.",
    "deploy": "Make a deployment of a model as it is: one engine, checked, nothing searched.",
    "serve": "Serve a deployment, or a folder of them, over HTTP and gRPC.",
    "analyse": "Show where a service's time goes, why slow requests are slow, and what it can carry.",
    "plan-serving": "Choose engine, threads, instances and batching for a service's objective, and write them down.",
    "infer": "Send samples to a server, and show what its model says.",
    "cascade": "Make one deployment of two: the large one is asked only where the small one is in doubt.",
    "load": "Put load on a service by a plan that is fixed before, and say what came back.",
    "compare": "Compare two services, live and interleaved, or two recorded runs.",
    "gate": "Judge a service by limits, for CI: met, missed, or cannot be told.",
    "predict": "Run a deployment over a file, in this process, and write what it says.",
    "conformance": "Check any Open Inference Protocol server, and say where it does otherwise.",
    "doctor": "Show what works here, and the fix for what does not.",
}
"""Each verb lives in a module of its name, which is imported when it is called."""

LAST_STANDARD_FILE = 2

HELP = frozenset(("--help", "-h", "--version"))
"""What is printed before any verb is called, and not in JSON."""

RESUMES = ("optimize", "demo", "predict")


def make_app(called: str | None = None) -> App:
    """Make the command line's parser.

    A verb's line in the list is written here, so that the list imports none; ``called`` speaks for itself.
    """
    from importlib.metadata import version

    from cyclopts import App, Parameter

    app = App(
        name="hasten",
        help="From a trained model to a proven, faster one.",
        help_epilogue="Try: hasten demo",
        version=version("hasten"),
        help_format="rst",
        suppress_keyboard_interrupt=False,
        result_action="return_value",
        default_parameter=Parameter(negative=()),
    )
    for place, (verb, text) in enumerate(VERBS.items()):
        line = None if verb == called else text
        place_of = f"hasten.cli.{module_of(verb)}:{module_of(verb)}"
        app.command(place_of, name=verb, help=line, sort_key=place, help_epilogue="")
    app.register_install_completion_command(add_to_startup=False)
    return app


def module_of(verb: str) -> str:
    """Give the module, and in it the function, of a verb: ``import`` is a keyword, and names have no hyphens."""
    return "import_" if verb == "import" else verb.replace("-", "_")


def main() -> None:
    """Run the command of ``sys.argv`` and leave with its exit code."""
    _open_standard_files()
    _end_when_told()
    sys.exit(run(sys.argv[1:]))


def _open_standard_files() -> None:
    """Let those of descriptors 0 to 2 that are closed go nowhere, so that no socket or pipe takes their numbers."""
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= LAST_STANDARD_FILE:  # the lowest that is free
        os.set_inheritable(nowhere, True)
    os.close(nowhere)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))  # noqa: SIM115


def _end_when_told() -> None:
    """Let SIGTERM end process 1, as a container has it, before a server listens to it: the system would ignore it.

    In all others the system's own way stays: it does not wait for Python, which may be within an engine.
    """
    if os.getpid() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))


def run(tokens: Sequence[str]) -> int:
    """Run one command and give its exit code."""
    try:
        code = _run(tokens)
        sys.stdout.flush()  # here, where a reader that has gone can still be told from a defect
    except BrokenPipeError:  # whoever reads has enough, as ``head`` has
        _leave_standard_output()
        return 1
    return code


def _run(tokens: Sequence[str]) -> int:
    from cyclopts import CycloptsError

    as_json = "--json" in tokens
    try:
        with apart() if as_json and not HELP.intersection(tokens) else contextlib.nullcontext():
            answer = make_app(tokens[0] if tokens else None)(
                list(tokens), exit_on_error=False, print_error=False, verbose=False
            )
        if answer is None:  # --help, --version and --install-completion have printed already
            return 0
        _print(answer, as_json=as_json)
        return int(answer.code)
    except CycloptsError as error:
        return _fail(error, f"{_one_line(error)} (hasten {_verb(tokens)}--help)", 2, tokens)
    except HastenError as error:
        usage = isinstance(error, UsageError) and not isinstance(error, BadInput)
        return _fail(error, _one_line(error), 2 if usage else 1, tokens)
    except KeyboardInterrupt:
        again = "; the same command goes on where it was" if tokens and tokens[0] in RESUMES else ""
        print(f"hasten: stopped{again}", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:  # noqa: BLE001 - the last resort: one line for the user, the trace with --debug
        text = f"{type(error).__name__}: {_one_line(error)} (a defect of hasten; --debug shows where)"
        return _fail(error, text, 1, tokens)


def _leave_standard_output() -> None:
    """Let what is still to be written go nowhere: the interpreter writes it out as it ends, and would complain."""
    with contextlib.suppress(io.UnsupportedOperation):  # it was replaced by what is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _print(answer: Answer, *, as_json: bool) -> None:
    if as_json:
        import msgspec

        sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer.document), indent=2).decode() + "\n")
        return
    from rich.console import Console

    from hasten.cli.answer import Verbatim

    console = Console(highlight=False)
    for item in answer.shown:
        if isinstance(item, Verbatim):
            sys.stdout.write(item.text + "\n")
        else:
            console.print(item)


def _fail(error: BaseException, text: str, code: int, tokens: Sequence[str]) -> int:
    if "--debug" in tokens:
        traceback.print_exception(error)
    print(f"hasten: error: {text}", file=sys.stderr)  # noqa: T201
    if "--json" in tokens:
        import msgspec

        document = {"error": {"kind": type(error).__name__, "message": text, "exit_code": code}}
        sys.stdout.write(msgspec.json.encode(document).decode() + "\n")
    return code


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _verb(tokens: Sequence[str]) -> str:
    return f"{tokens[0]} " if tokens and tokens[0] in VERBS else ""
