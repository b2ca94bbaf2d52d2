"""Fuse: say in one operator what an exporter spelled out in many. Lossless.

What ONNX Runtime 1.31 and OpenVINO 2026.4 do with the results on CPUs, read from their optimized graphs: ONNX Runtime
runs LayerNormalization, Gelu and Attention as one kernel each (the first two it also makes by itself, at its level
"extended"; attention it leaves in pieces), HardSwish as two. OpenVINO takes them, and also
com.microsoft.MultiHeadAttention, as one node each (attention as ScaledDotProductAttention). Swish (version 24) is not
written: ONNX Runtime expands it to four nodes, while it fuses x * sigmoid(x) by itself. Convolution, addition and
activation are left to the engines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import onnx

from hasten.artifact import Artifact
from hasten.graph.model import read_model, refresh_shapes, write_model
from hasten.graph.rewrite import Rule, remove_dead, until_stable
from hasten.passes.fold_duplicates import merge_constants, merge_duplicates
from hasten.passes.fold_noops import merge_moves
from hasten.passes.fuse_activations import fuse_gelu, fuse_hard_swish
from hasten.passes.fuse_attention import fuse_attention, merge_projections
from hasten.passes.fuse_layer_norm import fuse_layer_norm
from hasten.settings import Choice, Doc
from hasten.transform import Context


@dataclass(frozen=True, kw_only=True)
class Fuse:
    """Find layer-norm, GELU, hard swish and attention in a graph, and write each as one operator.

    It finds most after ``fold``. The version of the operator set is raised where an operator needs it.
    """

    name: ClassVar[str] = "fuse"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = False

    target: Annotated[
        Literal["standard", "onnxruntime"],
        Doc("standard: ONNX operators only; onnxruntime: also those of com.microsoft"),
        Choice(("standard", "onnxruntime")),
    ] = "standard"
    attention: Annotated[bool, Doc("write attention as one operator"), Choice((True, False))] = True
    projections: Annotated[
        bool, Doc("make one product of those that share an input, such as Q, K and V"), Choice((False, True))
    ] = False

    def why_not(self, source: Artifact) -> str | None:
        """It takes ONNX models."""
        return None if source.format == "onnx" else f"it takes ONNX models, not {source.format}"

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Write the fused model, or give ``source`` where there is nothing to fuse."""
        ctx.progress("fusing", None)
        model = read_model(source)
        if not fuse(model, self):
            return source
        return write_model(model, ctx.folder, source)


def fuse(model: onnx.ModelProto, settings: Fuse | None = None) -> int:
    """Apply the rules that ``settings`` ask for. Changes ``model`` in place; gives the number of fusions' changes."""
    settings = settings or Fuse()
    until_stable(model, (merge_moves, merge_duplicates, remove_dead), who="fuse")
    refresh_shapes(model)
    changes = until_stable(model, tuple(_rules(settings)), who="fuse")
    if changes:
        until_stable(model, (merge_constants, merge_duplicates, remove_dead), who="fuse")
    return changes


def _rules(settings: Fuse) -> Iterator[Rule]:
    yield fuse_layer_norm
    yield fuse_gelu
    yield fuse_hard_swish
    if settings.attention:
        yield partial(fuse_attention, microsoft=settings.target == "onnxruntime")
    if settings.projections:
        yield merge_projections
