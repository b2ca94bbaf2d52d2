import subprocess
import sys

import pytest

from hasten.errors import BadInput
from hasten.frontends.imports import frontend_name, source_name


def test_a_frontend_is_chosen_by_ending_or_form() -> None:
    assert frontend_name("a/model.ONNX") == "onnx"
    assert frontend_name("a/model.pt2") == "pytorch"
    assert frontend_name("a/net.py:make") == "pytorch"


def test_a_file_of_weights_alone_says_what_is_missing() -> None:
    with pytest.raises(BadInput, match=r"module\.py:factory"):
        frontend_name("model.safetensors")


def test_a_source_is_named_without_its_folder() -> None:
    assert source_name("/home/someone/net.py:make") == "net.py:make"


def test_looking_at_a_model_imports_neither_torch_nor_a_runtime() -> None:
    code = (
        "import sys, hasten.frontends, hasten.frontends.onnx, hasten.samples.readers as r\n"
        "print([m for m in ('torch', 'onnxruntime', 'openvino') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
