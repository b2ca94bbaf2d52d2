import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hasten.cli.answer import Answer
from hasten.cli.app import VERBS, make_app, module_of, run
from hasten.testing.models import mlp, write


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(mlp(), tmp_path / "model.onnx")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"hasten {verb}" in shown.partition("Usage")[2].partition("\n")[2]
    for option in ("--json", "--show-python", "--debug", "--home"):
        assert option in shown


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_function_of_its_own_module(verb: str) -> None:
    function = make_app()[verb].default_command
    assert function
    assert function.__module__ == f"hasten.cli.{module_of(verb)}"


def test_help_imports_neither_a_runtime_nor_the_search() -> None:
    code = "import sys; from hasten.cli.app import run; run(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "onnxruntime", "openvino", "onnx", "numpy", "scipy", "hasten.search.optimize"}


def test_the_entry_point_is_there_before_what_takes_long_to_import() -> None:
    code = "import sys, hasten.cli.app; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"cyclopts", "msgspec", "rich"}


@pytest.mark.parametrize(("process", "ended"), [(1, 143), (2, -signal.SIGTERM)])
def test_what_ends_a_process_ends_process_1_too_while_it_begins(process: int, ended: int) -> None:
    code = f"""
import os, signal
from hasten.cli import app
me = os.getpid()
os.getpid = lambda: {process}
app.run = lambda tokens: os.kill(me, signal.SIGTERM) or 0
app.main()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == ended


def test_standard_files_that_are_closed_go_nowhere() -> None:
    code = "import os, sys; from hasten.cli.app import main; main()"
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        command = f'exec "$0" -c "$1" doctor --help {closed}'
        done = subprocess.run(["sh", "-c", command, sys.executable, code], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b""), closed
    code = """
import os
from hasten.cli import app
os.close(0), os.close(1)
app.run = lambda tokens: 0 if all(os.path.samestat(os.fstat(n), os.stat(os.devnull)) for n in (0, 1)) else 5
app.main()
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


USAGE = {
    "a port beyond the last": (["serve", "{model}", "--port", "70000"], "--port is 70000"),
    "a port below the first": (["serve", "{model}", "--port", "-1"], "--port is -1"),
    "a port of gRPC below none": (["serve", "{model}", "--grpc-port", "-2"], "--grpc-port is -2"),
    "one port for two protocols": (["serve", "{model}", "--port", "8001"], "are both 8001"),
    "an unknown verb": (["optimise", "m.onnx"], "optimize"),
    "an unknown option": (["inspect", "{model}", "--wrong"], "--wrong"),
    "a value without its unit": (["optimize", "{model}", "--data", "x.npz", "--p99", "5"], "as 5ms"),
    "a share beyond one": (["optimize", "{model}", "--data", "x.npz", "--max-drop", "3"], "1%"),
    "hardware that is not here": (["optimize", "{model}", "--data", "x.npz", "--target", "tpu"], "'tpu'"),
    "no data": (["optimize", "{model}"], "--data"),
    "an unknown pass": (["apply", "fuldo", "{model}"], "did you mean 'fold'"),
    "an unknown engine": (["measure", "{model}", "--engine", "onxruntime"], "did you mean 'onnxruntime'"),
    "an unknown setting": (["measure", "{model}", "--engine", "onnxruntime:thread=1"], "did you mean 'threads'"),
    "a setting out of range": (["measure", "{model}", "--engine", "onnxruntime:threads=many"], "threads"),
    "one engine twice": (["measure", "{model}", "--engine", "onnxruntime", "--engine", "onnxruntime"], "twice"),
    "a seed below zero": (["measure", "{model}", "--seed", "-1"], "'-1' is no seed"),
    "a seed that is no number": (["apply", "fold", "{model}", "--seed", "x"], "'x' is no seed"),
    "an unknown axis": (["inspect", "{model}", "--dims", "bach=3"], "did you mean 'batch'"),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_wrong_command_is_one_line_and_exit_code_2(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, wanted = USAGE[case]
    code = run([*(word.format(model=model) for word in words), *_home(words, tmp_path)])
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("hasten: error: ")
    assert wanted in said.err


WRONG = {
    "no such file": (["inspect", "{folder}/none.onnx"], "none.onnx"),
    "a truncated model": (["inspect", "{folder}/half.onnx"], "half.onnx"),
    "no pass named": (["apply", "{model}"], "at least one pass"),
    "no run yet": (["report"], "no run"),
    "no such run": (["report", "zzz"], "zzz"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_1(
    case: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "half.onnx").write_bytes(model.read_bytes()[:200])
    words, wanted = WRONG[case]
    code = run([*(word.format(model=model, folder=tmp_path) for word in words), *_home(words, tmp_path)])
    said = capsys.readouterr()
    assert code == 1
    assert said.err.count("\n") == 1
    assert said.err.startswith("hasten: error: ")
    assert wanted in said.err


def test_an_error_with_json_is_one_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tmp_path / "none.onnx"), "--json", "--home", str(tmp_path)]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["kind"] == "BadInput"
    assert document["error"]["exit_code"] == 1


def test_what_the_users_own_code_prints_is_no_part_of_the_document(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loud.py").write_text(
        "import numpy as np\nprint('imported')\n\n"
        "def f():\n    print('called')\n    return np.zeros((4, 16), np.float32), np.zeros(4)\n"
    )
    words = ["apply", "fold", str(model), "--data", f"{tmp_path / 'loud.py'}:f", "--home", str(tmp_path / "home")]
    assert run([*words, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["digest"]
    assert "imported\ncalled\n" in said.err
    assert run(words) == 0
    assert capsys.readouterr().out.startswith("imported\ncalled\n")


def test_help_stays_on_standard_output_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measure", "--json", "--help"]) == 0
    assert "--precision" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["apply", "--list"], ["apply", "--list", "--json"], ["--help"], ["none", "--json"]])
def test_a_reader_that_has_gone_is_an_exit_code_and_no_trace(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "hasten", *words]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if not line.startswith("hasten: error: Unknown command")] == []


def test_what_fails_while_it_is_printed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hasten.cli.apply.list_answer", lambda: Answer(document=None, shown=("[/nothing]",)))
    assert run(["apply", "--list"]) == 1
    assert capsys.readouterr().err.startswith("hasten: error: MarkupError: ")


def test_a_trace_is_shown_with_debug_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["inspect", str(tmp_path / "none.onnx"), "--home", str(tmp_path)]
    run(words)
    assert "Traceback" not in capsys.readouterr().err
    run([*words, "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_control_c_says_that_the_same_command_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hasten.cli.optimize.search", stopped)
    monkeypatch.setattr("hasten.cli.doctor.examine", stopped)
    assert run(["optimize", str(model), "--data", "x.npz", "--home", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "hasten: stopped; the same command goes on where it was\n"
    assert run(["doctor"]) == 130
    assert capsys.readouterr().err == "hasten: stopped\n"


def test_a_defect_is_one_line_that_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(home: Path) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("hasten.cli.doctor.examine", broken)
    assert run(["doctor"]) == 1
    said = capsys.readouterr().err
    assert said == "hasten: error: ZeroDivisionError: division by zero (a defect of hasten; --debug shows where)\n"


def test_completion_scripts_know_the_verbs_and_their_options() -> None:
    script = make_app("measure").generate_completion(shell="bash")  # noqa: S604 - names a shell, starts none
    for word in (*VERBS, "--engine", "--show-python"):
        assert word in script


def _home(words: list[str], folder: Path) -> list[str]:
    return ["--home", str(folder / "home")] if words[0] in VERBS else []


@pytest.mark.parametrize("verb", VERBS)
def test_no_example_is_cut_in_a_terminal_of_80_columns(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    lines = inspect.getsource(importlib.import_module(f"hasten.cli.{module_of(verb)}")).splitlines()
    examples = [line.strip() for line in lines if re.match(r"\s+hasten \w", line)]
    assert all(example in shown for example in examples), shown
