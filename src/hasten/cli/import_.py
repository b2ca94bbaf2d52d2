"""``hasten import``: bring a model into the store."""

from __future__ import annotations

from pathlib import Path

from hasten.cli.answer import COMMON, Answer, Common, Verbatim, describe, python_answer
from hasten.cli.models import find_model, import_lines
from hasten.report import format as fmt
from hasten.store import Store


def import_(model: str, /, *, state: Path | None = None, common: Common = COMMON) -> Answer:
    """Bring a model into the store: checked, its shapes inferred, and against its source where that can run.

    The digest that comes back stands for the model in every other verb.

    .. code-block:: console

        hasten import model.onnx
        hasten import net.py:make --state net.safetensors
        hasten optimize 3f2a91c04d7be815 --data val.parquet

    Args:
        model: An ONNX file, an exported program (.pt2), or module.py:factory.
        state: Weights for module.py:factory: a safetensors or weights-only file.
        common: The options of every verb.
    """
    if common.show_python:
        return python_answer(*import_lines(model, common.home, state), "print(model.digest)")
    artifact = find_model(model, Store(common.home), state=state)
    signature = [f"  in   {spec}" for spec in artifact.signature.inputs]
    signature += [f"  out  {spec}" for spec in artifact.signature.outputs]
    head = f"{artifact.digest[:16]}  {artifact.format}, {fmt.size(artifact.size_bytes)}, {artifact.entry}"
    return Answer(document=describe(artifact), shown=(Verbatim("\n".join([head, *signature])),))
