"""The how-to page on adding an engine: its files are written out and run as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-an-engine.md"


def written_out(folder: Path) -> list[str]:
    """Write each Python block whose first line names a file; give the names."""
    blocks = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for name, text in blocks:
        (folder / name).write_text(text)
    return [name for name, _ in blocks]


def test_the_worked_example_keeps_the_contract_and_registers(tmp_path: Path) -> None:
    assert written_out(tmp_path) == ["reference_engine.py", "test_reference_engine.py", "use_reference_engine.py"]
    for command in (["-m", "pytest", "-q", "-W", "error", "test_reference_engine.py"], ["use_reference_engine.py"]):
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
