"""The messages are those that clients have, and get into nobody's way."""

import subprocess
import sys

import pytest

pytest.importorskip("google.protobuf")

from hasten.protocol.grpc_messages import FILE, SCHEMA, message


def fields(descriptor):
    return {field.name: (field.number, field.type, field.is_repeated) for field in descriptor.fields}


def test_every_field_has_the_number_and_type_that_triton_gives_it() -> None:
    theirs = pytest.importorskip("tritonclient.grpc.service_pb2", reason="tritonclient[grpc] is not installed")
    config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    for name in SCHEMA:
        there = theirs if hasattr(theirs, name.partition(".")[0]) else config
        known = there
        for part in name.split("."):
            known = getattr(known, part)
        ours = fields(message(name).DESCRIPTOR)
        assert ours.items() <= fields(known.DESCRIPTOR).items(), name


def test_it_lives_beside_other_protocol_buffers_of_the_same_names() -> None:
    code = """
from google.protobuf import descriptor_pb2, descriptor_pool
import hasten.protocol.grpc_messages as ours
other = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference", syntax="proto3")
other.message_type.add(name="ModelInferRequest")
descriptor_pool.Default().AddSerializedFile(other.SerializeToString())
print(ours.message("ModelInferRequest")(model_name="m").model_name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "m"


def test_reflection_can_show_every_call() -> None:
    (service,) = FILE.service
    assert service.name == "GRPCInferenceService"
    assert "ModelInfer" in [method.name for method in service.method]
