"""Fold: compute ahead, put batch-norm into the layers before it, and clear what the exporter left. Lossless."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import onnx
from msgspec import Meta

from hasten.artifact import Artifact
from hasten.graph.model import read_model, write_model
from hasten.graph.rewrite import remove_dead, until_stable
from hasten.passes.fold_batch_norm import fold_batch_norm, fold_scales
from hasten.passes.fold_constants import (
    choose_branches,
    fold_constants,
    fold_shapes,
    name_constants,
    name_ranges,
    settle_reshapes,
)
from hasten.passes.fold_duplicates import merge_constants, merge_duplicates
from hasten.passes.fold_noops import drop_expands, drop_noops, merge_moves, settle_casts
from hasten.settings import Doc
from hasten.transform import Context

MAX_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Compute constant parts ahead, put batch-norm into the layer before, drop what changes nothing.

    Inputs and outputs keep their names and shapes, outputs their values up to float rounding. Quantized weights
    (DequantizeLinear) stay quantized.
    """

    name: ClassVar[str] = "fold"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    max_bytes: Annotated[int, Doc("largest tensor that is computed ahead, in bytes"), Meta(ge=0)] = MAX_BYTES

    def why_not(self, source: Artifact) -> str | None:
        """It takes ONNX models."""
        return None if source.format == "onnx" else f"it takes ONNX models, not {source.format}"

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Write the folded model, or give ``source`` where there is nothing to fold."""
        ctx.progress("folding", None)
        model = read_model(source)
        if not fold(model, max_bytes=self.max_bytes):
            return source
        return write_model(model, ctx.folder, source)


def fold(model: onnx.ModelProto, *, max_bytes: int = MAX_BYTES) -> int:
    """Apply every rule until none changes anything. Changes ``model`` in place; gives the number of changes."""
    rules = (
        name_constants,
        partial(fold_constants, max_bytes=max_bytes),
        choose_branches,
        settle_casts,
        drop_noops,
        fold_shapes,
        merge_moves,  # before settle_reshapes: it reads the names of dimensions, which -1 hides
        settle_reshapes,
        name_ranges,
        drop_expands,
        fold_batch_norm,
        fold_scales,
        merge_duplicates,
        merge_constants,
        remove_dead,
    )
    return until_stable(model, rules, who="fold")
