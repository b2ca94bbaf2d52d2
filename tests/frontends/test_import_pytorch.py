import io
import re
import sys
import zipfile

import msgspec
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the PyTorch frontend needs the extra 'train'")
pytest.importorskip("onnxscript", reason="the PyTorch frontend needs the extra 'train'")

from hasten.errors import BadInput, BuildFailed, UnknownName, Untrusted  # noqa: E402
from hasten.frontends import import_model  # noqa: E402
from hasten.graph.model import read_model  # noqa: E402
from hasten.samples import Samples  # noqa: E402
from hasten.store import Store  # noqa: E402

FACTORY = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(4, 8)
        self.second = torch.nn.Linear(8, 3)

    def forward(self, features):
        return self.second(torch.relu(self.first(features)))

def bare():
    return Net()

def ready():
    torch.manual_seed(0)
    return Net(), torch.zeros(1, 4)

def wrong():
    return "net"
"""


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def factory(tmp_path):
    path = tmp_path / "net.py"
    path.write_text(FACTORY)
    return path


def convnet():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Flatten()
    )


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(4, 4)

    def forward(self, ids, mask=None, *, scale):
        return {"hidden": self.dense(ids) * mask, "total": ids.sum(-1) * scale}


# --- live modules


def test_batch_norm_stays_a_node_and_the_batch_is_symbolic(store) -> None:
    artifact = import_model(convnet(), store, example=torch.randn(1, 3, 8, 8))
    assert "BatchNormalization" in [node.op_type for node in read_model(artifact).graph.node]
    assert artifact.signature.inputs[0].shape == ("batch", 3, 8, 8)
    assert artifact.signature.outputs[0].name == "y"
    assert artifact.signature.outputs[0].shape == ("batch", 144)
    assert artifact.lineage[0].settings == {
        "frontend": "pytorch",
        "source": "Sequential",
        "batch": "symbolic",
        "checked": True,
    }


def test_the_users_module_is_left_as_it_was(store) -> None:
    module = convnet().train()
    module[1].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    import_model(module, store, example=torch.randn(2, 3, 8, 8))
    assert [part.training for part in module] == [True, False, True, True, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_an_encoder_layer_is_imported_and_agrees(store) -> None:
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    artifact = import_model(layer, store, example=torch.randn(1, 6, 16))
    assert artifact.signature.inputs[0].name == "src"
    assert artifact.signature.outputs[0].shape == ("batch", 6, 16)
    assert artifact.lineage[0].settings["checked"] is True


def test_inputs_and_outputs_have_the_names_of_the_code(store) -> None:
    example = {"ids": torch.randn(2, 4), "mask": torch.ones(2, 4), "scale": torch.tensor(2.0)}
    signature = import_model(Two(), store, example=example).signature
    assert [(spec.name, spec.shape) for spec in signature.inputs] == [
        ("ids", ("batch", 4)),
        ("mask", ("batch", 4)),
        ("scale", ()),
    ]
    assert [(spec.name, spec.shape) for spec in signature.outputs] == [("hidden", ("batch", 4)), ("total", ("batch",))]


def test_several_outputs_are_numbered(store) -> None:
    class Pair(torch.nn.Module):
        def forward(self, x):
            return x + 1, x.sum(-1)

    signature = import_model(Pair(), store, example=torch.randn(2, 3)).signature
    assert [spec.name for spec in signature.outputs] == ["output_0", "output_1"]


def test_samples_serve_as_the_example(store) -> None:
    samples = Samples({"input": np.random.default_rng(0).standard_normal((5, 3, 8, 8)).astype(np.float32)})
    artifact = import_model(convnet(), store, samples=samples)
    assert artifact.signature.inputs[0].shape == ("batch", 3, 8, 8)


def test_a_fixed_batch_is_exported_on_request(store) -> None:
    artifact = import_model(convnet(), store, example=torch.randn(2, 3, 8, 8), dynamic_batch=False)
    assert artifact.signature.inputs[0].shape == (2, 3, 8, 8)
    assert artifact.lineage[0].settings["batch"] == "fixed: as it was asked for"


def test_a_module_that_fixes_its_batch_is_exported_so_and_the_lineage_says_it(store) -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return x.reshape(2, 12) * 2

    artifact = import_model(Fixed(), store, example=torch.randn(2, 3, 4))
    assert artifact.signature.inputs[0].shape == (2, 3, 4)
    assert artifact.lineage[0].settings["batch"].startswith("fixed")


def test_an_export_that_disagrees_with_its_module_is_an_error_that_names_the_output(store) -> None:
    class Liar(torch.nn.Module):
        """While it is exported it computes something else: what a wrong wrapper or a tracing mistake does."""

        def forward(self, x):
            return {"fine": x + 1, "wrong": x * 2 if torch.compiler.is_exporting() else x * 3}

    with pytest.raises(Untrusted, match=r"imported output 'wrong' is off by 0\.33"):
        import_model(Liar(), store, example=torch.randn(2, 3))
    assert not list(store.artifacts())


def test_dropout_exported_in_training_mode_is_found_out(store, tmp_path) -> None:
    torch.manual_seed(0)
    program = torch.export.export(torch.nn.Dropout(0.5).train(), (torch.ones(4, 64),))
    torch.export.save(program, tmp_path / "train.pt2")
    with pytest.raises(Untrusted, match="'y'"):
        import_model(tmp_path / "train.pt2", store)


def test_the_exporter_is_quiet_and_leaves_no_local_path_in_the_model(store, capfd) -> None:
    artifact = import_model(convnet(), store, example=torch.randn(1, 3, 8, 8))
    assert capfd.readouterr() == ("", "")
    data = artifact.entry.read_bytes()
    assert __file__.encode() not in data
    assert b"site-packages" not in data


@pytest.mark.parametrize(
    ("example", "error", "word"),
    [
        (None, BadInput, "example inputs"),
        (torch.randn(1, 5, 8, 8), BadInput, "fails on the example"),
        ({"inptu": torch.randn(1, 3, 8, 8)}, UnknownName, "'input'"),
        ((torch.randn(1, 3, 8, 8), torch.randn(1)), BadInput, "does not fit forward"),
        (["text"], BadInput, "'input' is a str"),
    ],
)
def test_a_wrong_example_is_one_clear_error(store, example, error, word) -> None:
    with pytest.raises(error, match=word):
        import_model(convnet(), store, example=example)


def test_a_module_that_cannot_be_exported_is_a_failed_build(store) -> None:
    class Branches(torch.nn.Module):
        def forward(self, x):
            return x if x.sum().item() > 0 else x * 2

    with pytest.raises(BuildFailed, match=r"torch\.onnx\.export"):
        import_model(Branches(), store, example=torch.randn(2, 3))


# --- module.py:factory and state files


def weights(seed: int) -> dict:
    torch.manual_seed(seed)
    return {
        "first.weight": torch.randn(8, 4),
        "first.bias": torch.randn(8),
        "second.weight": torch.randn(3, 8),
        "second.bias": torch.randn(3),
    }


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth"])
def test_a_factory_with_a_state_file_is_imported_with_those_weights(store, factory, tmp_path, ending) -> None:
    from safetensors.torch import save_file

    state = tmp_path / f"w.{ending}"
    save_file(weights(1), state) if ending == "safetensors" else torch.save({"state_dict": weights(1)}, state)
    artifact = import_model(f"{factory}:ready", store, state=state)
    kept = {t.name: t for t in read_model(artifact).graph.initializer}
    assert any(t.raw_data == weights(1)["first.weight"].numpy().tobytes() for t in kept.values())
    assert artifact.lineage[0].settings["source"] == "net.py:ready"
    assert artifact.lineage[0].settings["state"] == state.name
    assert artifact.signature.inputs[0].name == "features"


def test_a_factory_without_an_example_takes_one_from_the_caller(store, factory) -> None:
    artifact = import_model(f"{factory}:bare", store, example=np.zeros((2, 4), np.float32))
    assert artifact.signature.inputs[0].shape == ("batch", 4)


def test_keys_that_do_not_fit_are_named_in_one_line(store, factory, tmp_path) -> None:
    state = weights(0)
    del state["first.bias"]
    torch.save({**state, "third.weight": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match=r"it lacks 'first\.bias'; the model has no 'third\.weight'") as caught:
        import_model(f"{factory}:ready", store, state=tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_weights_of_another_shape_are_named(store, factory, tmp_path) -> None:
    torch.save({**weights(0), "first.bias": torch.zeros(9)}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match=r"first\.bias"):
        import_model(f"{factory}:ready", store, state=tmp_path / "w.pt")


class Planted:
    """Its unpickling would run code of the file's choice."""

    def __reduce__(self):
        return sys.exit, (1,)


def test_a_state_file_that_pickles_more_than_weights_is_refused(store, factory, tmp_path) -> None:
    torch.save({"first.weight": Planted()}, tmp_path / "w.pt")
    with pytest.raises(BadInput, match="more than weights"):
        import_model(f"{factory}:ready", store, state=tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("name", "state", "word"),
    [
        ("raedy", None, "has no function 'raedy'"),
        ("wrong", None, "gave a str"),
        ("bare", None, "example inputs"),
        ("ready", "gone.pt", "no state file"),
        ("ready", "net.py", "cannot be read as weights|more than weights"),
    ],
)
def test_a_factory_that_cannot_be_used_is_one_clear_error(store, factory, tmp_path, name, state, word) -> None:
    with pytest.raises(BadInput, match=word):
        import_model(f"{factory}:{name}", store, state=tmp_path / state if state else None)


# --- .pt2 files


def saved(tmp_path, module=None, *, dynamic=True):
    shapes = ({0: torch.export.Dim("rows")},) if dynamic else None
    program = torch.export.export((module or convnet()).eval(), (torch.randn(2, 3, 8, 8),), dynamic_shapes=shapes)
    path = tmp_path / "net.pt2"
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize(("dynamic", "first"), [(True, "batch"), (False, 2)])
def test_an_exported_program_keeps_the_batch_it_was_exported_with(store, tmp_path, dynamic, first) -> None:
    artifact = import_model(saved(tmp_path, dynamic=dynamic), store)
    assert artifact.signature.inputs[0].shape == (first, 3, 8, 8)
    assert artifact.signature.outputs[0].shape == (first, 144)
    assert "BatchNormalization" in [node.op_type for node in read_model(artifact).graph.node]
    assert artifact.lineage[0].settings["checked"] is True


def test_derived_shapes_pass_the_screening(store, tmp_path) -> None:
    class Window(torch.nn.Module):
        def forward(self, x):
            return x.reshape(x.shape[0] * x.shape[1] // 3, -1)

    assert import_model(saved(tmp_path, Window()), store).lineage[0].settings["checked"] is True


def rewritten(path, changes: dict):
    """Give a copy of an archive with some records changed or added."""
    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            data = old.read(name)
            change = changes.pop(name.removeprefix(f"{root}/"), None)
            new.writestr(name, change(data) if change else data)
        for name, make in changes.items():
            new.writestr(f"{root}/{name}", make(b""))
    return target


def pickled() -> bytes:
    file = io.BytesIO()
    torch.save((Planted(),), file)
    return file.getvalue()


MODEL = "models/model.json"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"data/sample_inputs/model.pt": lambda data: pickled()}, "pickles more than tensors"),
        ({"data/aotinductor/model/x.so": lambda data: b"\x7fELF"}, "aotinductor"),
        ({"data/constants/opaque_obj_0": lambda data: pickled()}, "opaque_obj_0"),
        ({"data/weights/model.pt": lambda data: pickled()}, r"data/weights/model\.pt"),
        ({MODEL: lambda data: data.replace(b"torch.ops.aten.relu.default", b"torch.hub.load")}, r"torch\.hub\.load"),
        (
            {MODEL: lambda data: data.replace(b"torch.ops.aten.relu.default", b"torch.ops.load_library")},
            "load_library",
        ),
        (
            {MODEL: lambda data: data.replace(b"positive=True, integer=True)", b"positive=exit(1))")},
            "no arithmetic",
        ),
        ({MODEL: lambda data: data.replace(b"Symbol('", b"sympify('")}, "no arithmetic"),
        ({MODEL: lambda data: data.replace(b"builtins.tuple", b"collections.defaultdict")}, "defaultdict"),
        (
            {
                MODEL: lambda data: data.replace(
                    b'"forward_arg_names": ["input"]', b'"forward_arg_names": ["a=exit(1)"]'
                )
            },
            "no name",
        ),
    ],
)
def test_an_archive_that_would_run_code_is_refused_before_torch_loads_it(store, tmp_path, changes, word, monkeypatch):
    path = rewritten(saved(tmp_path), dict(changes))

    def loads(*args, **kwargs):
        raise AssertionError("torch.export.load was called")

    monkeypatch.setattr(torch.export, "load", loads)
    with pytest.raises(BadInput, match=word):
        import_model(path, store)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"PK" * 500])
def test_a_damaged_archive_is_one_clear_error(store, tmp_path, damage) -> None:
    path = saved(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadInput, match=r"net\.pt2"):
        import_model(path, store)


def calling(target: str, *inputs: dict):
    """Let the graph's relu be another call with other arguments."""

    def change(data: bytes) -> bytes:
        program = msgspec.json.decode(data)
        node = next(
            node
            for node in program["graph_module"]["graph"]["nodes"]
            if node["target"] == "torch.ops.aten.relu.default"
        )
        node["target"] = target
        if inputs:
            node["inputs"] = [*inputs]
        return msgspec.json.encode(program)

    return change


@pytest.mark.parametrize(
    "target",
    [
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default",
        "torch.ops.aten._print.default",
        "torch.ops.aten.set_.source_Tensor",
        "torch.ops.aten.resize_.default",
        "torch.ops.aten._sparse_coo_tensor_unsafe.default",
        "torch.ops.aten.__class__",
        "torch.ops.aten.relu.__class__",
        "torch.ops.higher_order.call_torchbind",
        "torch.ops.higher_order.triton_kernel_wrapper_mutation",
        "torch.ops.higher_order.print",
        "torch.ops.higher_order.cond.py_impl",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "_operator.call",
        "math.factorial",
        "torch._C._jit_set_profiling_mode",
    ],
)
def test_a_program_that_calls_more_than_tensor_arithmetic_is_refused(store, tmp_path, target) -> None:
    path = rewritten(saved(tmp_path), {MODEL: calling(target)})
    with pytest.raises(BadInput, match=re.escape(target)):
        import_model(path, store)


def test_a_program_that_would_make_a_file_is_refused_and_makes_none(store, tmp_path) -> None:
    wanted = tmp_path / "planted.bin"
    arguments = (
        {"name": "filename", "arg": {"as_string": str(wanted)}, "kind": 1},
        {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
        {"name": "size", "arg": {"as_int": 4096}, "kind": 1},
    )
    path = rewritten(saved(tmp_path), {MODEL: calling("torch.ops.aten.from_file.default", *arguments)})
    with pytest.raises(BadInput, match="does more than compute tensors"):
        import_model(path, store)
    assert not wanted.exists()


def test_a_text_or_an_operator_where_none_belongs_is_refused(store, tmp_path) -> None:
    relu = "torch.ops.aten.relu.default"
    text = {"name": "self", "arg": {"as_string": "/etc/passwd"}, "kind": 1}
    with pytest.raises(BadInput, match="with the text '/etc/passwd'"):
        import_model(rewritten(saved(tmp_path), {MODEL: calling(relu, text)}), store)
    called = {"name": "self", "arg": {"as_operator": "torch.hub.load"}, "kind": 1}
    with pytest.raises(BadInput, match=r"calls 'torch\.hub\.load'"):
        import_model(rewritten(saved(tmp_path), {MODEL: calling(relu, called)}), store)


def test_operators_that_take_a_text_and_control_flow_pass_the_screening(store, tmp_path) -> None:
    class Net(torch.nn.Module):
        def forward(self, x):
            with torch.no_grad():
                scale = torch.div(x.sum(), 3, rounding_mode="floor")
            y = torch.nn.functional.gelu(torch.einsum("nchw->nhwc", x), approximate="tanh") + scale
            return torch.cond(x.sum() > 0, lambda t: t * 2, lambda t: t - 1, (y,))

    assert import_model(saved(tmp_path, Net()), store).lineage[0].settings["checked"] is True


def test_a_record_that_grows_in_reading_is_refused_before_it_is_read(store, tmp_path) -> None:
    path = saved(tmp_path)
    target = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (b" " * 2**24 if name.endswith("model.json") else b""))
    with pytest.raises(BadInput, match="compressed"):
        import_model(target, store)


def test_a_pickle_that_grows_in_reading_is_refused_too(store, tmp_path) -> None:
    def packed(data: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        return file.getvalue()

    path = rewritten(saved(tmp_path), {"data/sample_inputs/model.pt": packed})
    with pytest.raises(BadInput, match="compressed"):
        import_model(path, store)
