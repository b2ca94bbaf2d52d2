"""The messages of ``inference.GRPCInferenceService``, in a descriptor pool of their own.

kserve and tritonclient register the same names in protobuf's common pool; ours are in none of theirs, so that either
can be imported beside hasten. Names and numbers are those of the Open Inference Protocol's ``grpc_service.proto`` and
of Triton's extensions to it, with the fields that are used here; unknown fields of a client are kept by protobuf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import descriptor_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "inference"
SERVICE = "GRPCInferenceService"

_Field = descriptor_pb2.FieldDescriptorProto
_SCALARS: Mapping[str, int] = {
    "bool": _Field.TYPE_BOOL,
    "bytes": _Field.TYPE_BYTES,
    "double": _Field.TYPE_DOUBLE,
    "float": _Field.TYPE_FLOAT,
    "int32": _Field.TYPE_INT32,
    "int64": _Field.TYPE_INT64,
    "string": _Field.TYPE_STRING,
    "uint32": _Field.TYPE_UINT32,
    "uint64": _Field.TYPE_UINT64,
}

_NAMED = "name 1 string, version 2 string"
_TENSOR = (
    "name 1 string, datatype 2 string, shape 3 int64*, parameters 4 {InferParameter}, contents 5 InferTensorContents"
)
_MODEL_CALL = "repository_name 1 string, model_name 2 string, parameters 3 {ModelRepositoryParameter}"
_LATENCIES = "compute_input 2 StatisticDuration, compute_infer 3 StatisticDuration, compute_output 4 StatisticDuration"
_REGION = "name 1 string, key 2 string, offset 3 uint64, byte_size 4 uint64"
_SUMS = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")

SCHEMA: Mapping[str, str] = {
    "ServerLiveRequest": "",
    "ServerLiveResponse": "live 1 bool",
    "ServerReadyRequest": "",
    "ServerReadyResponse": "ready 1 bool",
    "ModelReadyRequest": _NAMED,
    "ModelReadyResponse": "ready 1 bool",
    "ServerMetadataRequest": "",
    "ServerMetadataResponse": "name 1 string, version 2 string, extensions 3 string*",
    "ModelMetadataRequest": _NAMED,
    "ModelMetadataResponse": "name 1 string, versions 2 string*, platform 3 string, "
    "inputs 4 ModelMetadataResponse.TensorMetadata*, outputs 5 ModelMetadataResponse.TensorMetadata*",
    "ModelMetadataResponse.TensorMetadata": "name 1 string, datatype 2 string, shape 3 int64*",
    "InferParameter": "bool_param 1 bool|, int64_param 2 int64|, string_param 3 string|, double_param 4 double|, "
    "uint64_param 5 uint64|",
    "InferTensorContents": "bool_contents 1 bool*, int_contents 2 int32*, int64_contents 3 int64*, "
    "uint_contents 4 uint32*, uint64_contents 5 uint64*, fp32_contents 6 float*, fp64_contents 7 double*, "
    "bytes_contents 8 bytes*",
    "ModelInferRequest": "model_name 1 string, model_version 2 string, id 3 string, parameters 4 {InferParameter}, "
    "inputs 5 ModelInferRequest.InferInputTensor*, outputs 6 ModelInferRequest.InferRequestedOutputTensor*, "
    "raw_input_contents 7 bytes*",
    "ModelInferRequest.InferInputTensor": _TENSOR,
    "ModelInferRequest.InferRequestedOutputTensor": "name 1 string, parameters 2 {InferParameter}",
    "ModelInferResponse": "model_name 1 string, model_version 2 string, id 3 string, parameters 4 {InferParameter}, "
    "outputs 5 ModelInferResponse.InferOutputTensor*, raw_output_contents 6 bytes*",
    "ModelInferResponse.InferOutputTensor": _TENSOR,
    "ModelConfigRequest": _NAMED,
    "ModelConfigResponse": "config 1 ModelConfig",
    "ModelConfig": "name 1 string, platform 2 string, backend 17 string, max_batch_size 4 int32, input 5 ModelInput*, "
    "output 6 ModelOutput*, dynamic_batching 11 ModelDynamicBatching",
    "ModelInput": "name 1 string, data_type 2 DataType, dims 4 int64*",
    "ModelOutput": "name 1 string, data_type 2 DataType, dims 3 int64*",
    "ModelDynamicBatching": "preferred_batch_size 1 int32*, max_queue_delay_microseconds 2 uint64",
    "ModelStatisticsRequest": _NAMED,
    "ModelStatisticsResponse": "model_stats 1 ModelStatistics*",
    "ModelStatistics": "name 1 string, version 2 string, last_inference 3 uint64, inference_count 4 uint64, "
    "execution_count 5 uint64, inference_stats 6 InferStatistics, batch_stats 7 InferBatchStatistics*",
    "InferStatistics": ", ".join(f"{name} {at} StatisticDuration" for at, name in enumerate(_SUMS, start=1)),
    "InferBatchStatistics": f"batch_size 1 uint64, {_LATENCIES}",
    "StatisticDuration": "count 1 uint64, ns 2 uint64",
    "RepositoryIndexRequest": "repository_name 1 string, ready 2 bool",
    "RepositoryIndexResponse": "models 1 RepositoryIndexResponse.ModelIndex*",
    "RepositoryIndexResponse.ModelIndex": "name 1 string, version 2 string, state 3 string, reason 4 string",
    "ModelRepositoryParameter": "bool_param 1 bool|, int64_param 2 int64|, string_param 3 string|, "
    "bytes_param 4 bytes|",
    "RepositoryModelLoadRequest": _MODEL_CALL,
    "RepositoryModelLoadResponse": "",
    "RepositoryModelUnloadRequest": _MODEL_CALL,
    "RepositoryModelUnloadResponse": "",
    "SystemSharedMemoryStatusRequest": "name 1 string",
    "SystemSharedMemoryStatusResponse": "regions 1 {SystemSharedMemoryStatusResponse.RegionStatus}",
    "SystemSharedMemoryStatusResponse.RegionStatus": _REGION,
    "SystemSharedMemoryRegisterRequest": _REGION,
    "SystemSharedMemoryRegisterResponse": "",
    "SystemSharedMemoryUnregisterRequest": "name 1 string",
    "SystemSharedMemoryUnregisterResponse": "",
}
"""Message -> its fields, each "name number type": a star is repeated, a bar one of several, braces a map from text."""

DATA_TYPES = (
    *("INVALID", "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
    *("FP16", "FP32", "FP64", "STRING", "BF16"),
)
"""The enum ``DataType`` of model configurations, in order."""

CALLS = (
    *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer", "ModelConfig"),
    *("ModelStatistics", "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
    *("SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister"),
)


def _file() -> descriptor_pb2.FileDescriptorProto:
    made = descriptor_pb2.FileDescriptorProto(name="hasten/grpc_service.proto", package=PACKAGE, syntax="proto3")
    enum = made.enum_type.add(name="DataType")
    for number, name in enumerate(DATA_TYPES):
        enum.value.add(name=f"TYPE_{name}", number=number)
    messages: dict[str, Any] = {}
    for name, fields in SCHEMA.items():
        outer, _, inner = name.rpartition(".")
        messages[name] = (messages[outer].nested_type if outer else made.message_type).add(name=inner)
        for field in filter(None, fields.split(", ")):
            _add_field(messages[name], name, *field.split(" "))
    service = made.service.add(name=SERVICE)
    for call in CALLS:
        service.method.add(name=call, input_type=f".inference.{call}Request", output_type=f".inference.{call}Response")
    return made


def _add_field(message: Any, owner: str, name: str, number: str, kind: str) -> None:
    label = _Field.LABEL_REPEATED if kind[-1] in "*}" else _Field.LABEL_OPTIONAL
    field = message.field.add(name=name, number=int(number), label=label)
    if kind.startswith("{"):
        entry = f"{name.title()}Entry"
        pair = message.nested_type.add(name=entry)
        pair.options.map_entry = True
        _add_field(pair, entry, "key", "1", "string")
        _add_field(pair, entry, "value", "2", kind[1:-1])
        kind = f"{owner}.{entry}"
    elif kind.endswith("|"):
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    kind = kind.rstrip("*|")
    if kind in _SCALARS:
        field.type = _SCALARS[kind]
    else:
        field.type = _Field.TYPE_ENUM if kind == "DataType" else _Field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{kind}"


FILE = _file()
"""The definition, as reflection gives it to clients."""

_POOL = DescriptorPool()
_POOL.Add(FILE)
_CLASSES: dict[str, type[Message]] = {}


def message(name: str) -> type[Message]:
    """Give a message's class by its name in the package, as "ModelInferRequest"."""
    if name not in _CLASSES:
        _CLASSES[name] = GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))
    return _CLASSES[name]
