"""What must be true of a ``.pt2`` archive before ``torch.export.load`` may see it.

That function unpickles (``weights_only=False``), evaluates symbolic shapes as Python (``sympy.sympify``), looks up
call targets by dotted name, imports what a tree's context names, writes argument names into generated code and loads
compiled libraries. Each of these is screened here: what ``torch.export.save`` writes for tensors, standard operators
and plain containers passes, anything else is refused. What is pickled at all is left to torch's restricted unpickler.
"""

from __future__ import annotations

import ast
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator

import msgspec

from hasten.artifact import Json
from hasten.errors import BadInput

OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|higher_order|quantized_decomposed)"
    r"\.((?!__)\w+|__i?(?:and|or|xor|lshift|rshift)__)(\.(?!_)\w+)?"
)
"""An operator of torch: its namespace, its name, and perhaps its overload."""

OUTSIDE = re.compile(
    r"from_file|save|load|open|_?print|warn|format|\w*_unsafe|\w*resize\w*|set_|set_data|set_storage\w*|record_stream"
    r"|_?pin_memory|\w*_seed|seed|set_grad_enabled|_?backward|_cufft_\w*|_record_function\w*|_test_\w*|_foobar"
)
"""Operators that reach files, the terminal, the process's state or a tensor's storage: no network needs one."""

HIGHER_ORDER = frozenset(
    [
        *("cond", "while_loop", "scan", "associative_scan", "map_impl", "invoke_subgraph"),
        *("wrap_with_set_grad_enabled", "wrap_with_autocast"),
    ]
)
"""Control flow that ``torch.export`` writes. The others call kernels, Python or compiled code by name."""

TEXT = re.compile(
    r"(conv[123]d|_convolution_mode|divide|div|pad|pad_sequence|gelu|gelu_backward|einsum|stft|meshgrid|index_reduce"
    r"|scatter|scatter_reduce|segment_reduce|quantile|nanquantile|searchsorted|fft_\w+|_?linalg_\w+"
    r"|_assert_async|_assert_scalar|_functional_assert_async|_functional_assert_scalar|_assert_tensor_metadata"
    r"|wrap_with_autocast|invoke_subgraph)_?"
)
"""Operators that take a string, such as the way to round or to pad; in any other call it could name a file."""

SHAPE_CALLS = re.compile(
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|xor|not_|lshift|rshift"
    r"|getitem)"
    r"|math\.(trunc|ceil|floor|sqrt|pow|exp|log|log2|a?(sin|cos|tan)h?)"
    r"|torch\._?sym_\w+"
)
"""Arithmetic on shapes."""

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

SYMBOL = re.compile(r"[a-z]+[0-9]+|[0-9.+\-eE]+")
"""A string inside a symbolic shape: a symbol's name, or the digits of a number."""

EXPRESSION_CALLS = frozenset(
    [
        *("Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Mod", "Max", "Min", "And", "Or", "Not"),
        *("Equality", "Unequality", "Eq", "Ne", "Gt", "Ge", "Lt", "Le", "Piecewise", "ExprCondPair", "Where"),
        *("StrictGreaterThan", "GreaterThan", "StrictLessThan", "LessThan", "FloorDiv", "ModularIndexing", "PythonMod"),
        *("CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "PowByNatural", "FloatPow", "FloatTrueDiv", "IntTrueDiv"),
        *("LShift", "RShift", "TruncToFloat", "TruncToInt", "RoundToInt", "RoundDecimal", "ToFloat", "Identity"),
    ]
)

CONTAINERS = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"})

READABLE = re.compile(
    r"(archive_format|archive_version|byteorder|\.data/(version|serialization_id|\.\w+)|extra/.*|models/model\.json"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
    r"|data/sample_inputs/model\.pt)"
)
"""Every record that a plain exported program has. Compiled code, opaque objects and old formats are not among them."""


def check_records(records: Iterable[zipfile.ZipInfo], size: int) -> list[str]:
    """Check that an archive of ``size`` bytes stores its records as they are: none grows in reading. Gives their names.

    Raises:
        BadInput: one is compressed or encrypted, which torch's own writer never does; two have one name; or together
            they claim more than there is.
    """
    names, claimed = [], 0
    for record in records:
        plain = record.compress_type == zipfile.ZIP_STORED and record.file_size == record.compress_size
        if not plain or record.flag_bits & 1:
            raise BadInput(f"the .pt2 file has {record.filename[:80]!r} compressed or encrypted, as torch never does")
        names.append(record.filename)
        claimed += record.file_size
    if claimed > size:
        raise BadInput(f"the records of the .pt2 file claim {claimed:,} bytes, and it has {size:,}")
    if len(set(names)) < len(names):
        raise BadInput("the .pt2 file has two records of one name")
    return names


def screen(names: Iterable[str], read: Callable[[str], bytes]) -> list[bytes]:
    """Check an archive's records; gives those that are pickled, for torch's restricted unpickler to judge.

    Args:
        names: The archive's records.
        read: Gives the bytes of one.

    Raises:
        BadInput: the archive holds something that loading would run.
    """
    records = list(names)
    for record in records:
        if not READABLE.fullmatch(record):
            raise BadInput(f"the .pt2 file holds {record!r}, which a plain torch.export.save does not write")
    if "models/model.json" not in records:
        raise BadInput("the .pt2 file holds no exported program; save it again with torch.export.save")
    _screen_program(_json(read("models/model.json"), "models/model.json"))
    pickled = [read(name) for name in records if name.startswith("data/sample_inputs/")]
    for kind in ("weights", "constants"):
        config_name = f"data/{kind}/model_{kind}_config.json"
        if config_name in records:
            pickled += [read(name) for name in _pickled_payloads(_json(read(config_name), config_name), kind)]
    return [data for data in pickled if data]


def _pickled_payloads(config: Json, kind: str) -> Iterator[str]:
    for payload in (config.get("config") or {}).values():
        name = str(payload["path_name"])
        if not re.fullmatch(r"(weight|tensor)_\d+", name):
            raise BadInput(f"the .pt2 file has the object {name!r} among its {kind}: hasten takes tensors only")
        if payload.get("use_pickle"):
            yield f"data/{kind}/{name}"


def _screen_program(program: Json) -> None:
    for key, value in _strings(program):
        if key == "as_operator":
            _screen_call(value)
        elif key == "target":
            if not re.fullmatch(r"[\w.]*", value) or value.startswith(("torch", "_operator", "math", "#")):
                _screen_call(value)
        elif key == "expr_str":
            _screen_expression(value)
        elif key in ("name", "forward_arg_names", "user_input_name") and value and not NAME.fullmatch(value):
            raise BadInput(f"the .pt2 file names something {value[:80]!r}, which is no name")
        elif key in ("in_spec", "out_spec"):
            _screen_tree(_json(value.encode(), key))
    for node in _objects(program):
        if isinstance(node.get("target"), str):
            _screen_text(str(node["target"]), node.get("inputs"))


def _screen_call(target: str) -> None:
    """Allow operators that compute tensors from tensors, plain control flow, and arithmetic on shapes."""
    if SHAPE_CALLS.fullmatch(target):
        return
    operator = OPERATOR.fullmatch(target)
    if operator is None:
        raise BadInput(f"the .pt2 file calls {target[:120]!r}, which is no standard operator")
    family, name, overload = operator.groups()
    if (family == "higher_order" and (name not in HIGHER_ORDER or overload)) or OUTSIDE.fullmatch(name):
        raise BadInput(f"the .pt2 file calls {target[:120]!r}, which does more than compute tensors from tensors")


def _screen_text(target: str, arguments: Json) -> None:
    """Refuse a string where the operator is not known to take one."""
    operator = OPERATOR.fullmatch(target)
    if operator is None or TEXT.fullmatch(operator[2]):
        return
    # A graph among the arguments has nodes of its own, each with its own strings.
    if text := [value for key, value in _strings(arguments, skip="as_graph") if key in ("as_string", "as_strings")]:
        raise BadInput(f"the .pt2 file calls {target!r} with the text {text[0][:80]!r}, which it has no use for")


def _screen_expression(text: str) -> None:
    """Allow calls of shape arithmetic on symbols and numbers, and nothing else that Python could evaluate."""
    refused = BadInput(f"the .pt2 file has the shape {text[:120]!r}, which is no arithmetic")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise refused from error
    allowed = (
        ast.Expression,
        ast.Call,
        ast.Name,
        ast.Load,
        ast.Constant,
        ast.keyword,
        ast.UnaryOp,
        ast.USub,
        ast.Tuple,
    )
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        fine = isinstance(node, allowed)
        if isinstance(node, ast.Name):
            fine = node.id in EXPRESSION_CALLS if id(node) in called else bool(SYMBOL.fullmatch(node.id))
        elif isinstance(node, ast.Call):
            fine = isinstance(node.func, ast.Name)
        elif isinstance(node, ast.Constant):
            fine = (
                bool(SYMBOL.fullmatch(node.value))
                if isinstance(node.value, str)
                else isinstance(node.value, bool | int | float)
            )
        if not fine:
            raise refused


def _screen_tree(spec: Json) -> None:
    """Allow trees of tuples, lists and dictionaries whose keys are names."""
    for node in _objects(spec):
        if "children_spec" not in node:
            raise BadInput("the .pt2 file has a container with a context that is no plain list of names")
        if node.get("type") not in CONTAINERS:
            raise BadInput(f"the .pt2 file has a container of type {node.get('type')!r}; hasten takes tuples and dicts")
        keys = _json(str(node.get("context") or "null").encode(), "context")
        listed = keys if isinstance(keys, list) else [] if keys is None else [keys]
        if not all(isinstance(key, str) and NAME.fullmatch(key) for key in listed):
            raise BadInput("the .pt2 file has a dictionary with a key that is no name")


def _strings(value: Json, key: str = "", *, skip: str | None = None) -> Iterator[tuple[str, str]]:
    """Give every string with the key that it, or the list it is in, stands under; nothing below the key ``skip``."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key, skip=skip)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name != skip:
                yield from _strings(item, str(name), skip=skip)


def _objects(value: Json) -> Iterator[dict[str, Json]]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(item)


def _json(data: bytes, what: str) -> Json:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadInput(f"the .pt2 file is damaged: {what} is no JSON") from error
