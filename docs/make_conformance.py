"""Writes docs/conformance.md from the checks of ``hasten conformance``.

    python docs/make_conformance.py

``tests/conformance/test_conformance_page.py`` fails where the page is not what this writes.
"""

from __future__ import annotations

import re
from pathlib import Path

from hasten.conformance.suite import CHECKS

PAGE = Path(__file__).with_name("conformance.md")

HEAD = """# What `hasten conformance` checks

Written from the code by `python docs/make_conformance.py`. How to run it: [how-to](how-to/conformance.md).

Each check has a level:

* **required**: the specification states it (the Open Inference Protocol's `inference_rest.md` and
  `inference_grpc.md`). A server that does otherwise breaks clients that follow the text.
* **recommended**: the specification leaves it open, or its older text had it; the suite has chosen, since clients
  need one answer. It counts only with `--strict`.
* **extension**: Triton's extensions and gRPC's own services. Checked where the server lists the extension in its
  metadata (`--assume NAME` checks it all the same); counts like what is required.

A check that cannot be told with the model at hand (an input of 16 bits has no JSON form; a model of one input has no
order of inputs) is skipped with its reason."""


def page() -> str:
    """Write the page."""
    parts = [HEAD]
    for group in dict.fromkeys(check.group for check in CHECKS):
        rows = [f"\n\n## {group}\n\n| check | level | | source |\n|---|---|---|---|"]
        for check in CHECKS:
            if check.group == group:
                level = f"extension `{check.extension}`" if check.extension else check.level
                text = re.sub("``", "`", check.text)
                rows.append(f"| `{check.name}` | {level} | {text} | {check.source} |")
        parts.append("\n".join(rows))
    return "".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
