"""Train a smaller model, which the user brings, on the outputs of the model at hand, and go on with the smaller one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import onnx
from google.protobuf.message import DecodeError
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model, uses_external_data

from hasten.artifact import Artifact
from hasten.errors import BadInput
from hasten.graph.model import opset_of, read_model, signature_of
from hasten.passes.finetune import check_alike, learned, samples_of, why_not_trained
from hasten.settings import Doc
from hasten.torchview.training import Training
from hasten.torchview.view import View
from hasten.transform import Context

OLDEST_OPSET = 13
"""As of every imported model; the import converts older ones."""


@dataclass(frozen=True, kw_only=True)
class Distill(Training):
    """Put another network in the model's place: ``student``, trained on the model's outputs and on the labels.

    Knowledge distillation, Hinton et al. 2015, arXiv:1503.02531. Inputs and outputs must be the same. Weights of any
    kind may be in the student's file: trained ones are a better start than random ones.
    """

    name: ClassVar[str] = "distill"
    uses_samples: ClassVar[bool] = False
    uses_training: ClassVar[bool] = True

    student: Annotated[str, Doc("path of the ONNX file that is trained and takes the model's place")] = ""

    def why_not(self, source: Artifact) -> str | None:
        """Say in a sentence why it cannot take ``source``, or None."""
        if reason := why_not_trained(source):
            return reason
        if not self.student:
            return "it needs a student: give the path of an ONNX file as the setting 'student'"
        if not Path(self.student).is_file():
            return f"there is no file {self.student!r} to take the student from"
        return None

    def reads(self) -> tuple[Path, ...]:
        """Give the files of the student: the result depends on what they hold."""
        return student_files(Path(self.student))

    def apply(self, source: Artifact, ctx: Context) -> Artifact:
        """Train the student, and write it, ``training.json`` beside it.

        Raises:
            BadInput: the student's file is no ONNX model that can be read.
            SignatureMismatch: its inputs or outputs are not the source's.
            Unsupported: there are no samples to train on, or nothing was gained.
            BuildFailed: the training went wrong.
        """
        samples = samples_of(self.name, source, ctx)
        student = read_student(Path(self.student))
        check_alike(source.signature, signature_of(student), called="student")
        view = View.of(student)
        learned(self, view, samples, ctx, teacher=View.of(read_model(source)))
        return view.save(ctx.folder, replace(source, traits=frozenset()), add={"distilled"})


def student_files(path: Path) -> tuple[Path, ...]:
    """Give the file of an ONNX model and those that its weights lie in.

    Raises:
        BadInput: it cannot be read.
    """
    model = _parsed(path)
    places = {ExternalDataInfo(t).location for t in model.graph.initializer if uses_external_data(t)}
    return (path, *(path.parent / place for place in sorted(places)))


def read_student(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its weights, and check it.

    Raises:
        BadInput: it is damaged, points outside its folder, or is older than what an import gives.
    """
    model = _parsed(path)
    if opset_of(model) < OLDEST_OPSET:
        raise BadInput(
            f"the student {path} has opset {opset_of(model)}, training needs {OLDEST_OPSET}; import it first"
        )
    try:
        load_external_data_for_model(model, str(path.parent))  # refuses places outside of the folder
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, OSError, ValueError) as error:
        raise BadInput(f"the student {path} is no valid ONNX model: {' '.join(str(error).split())[:300]}") from error
    return model


def _parsed(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BadInput(f"the student {path} is no ONNX model that can be read: {error}") from error
