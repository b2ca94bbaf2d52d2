"""What gRPC's health service says."""

import pytest

pytest.importorskip("google.protobuf", reason="needs the extra 'serve'")

from hasten.serve.grpc_side import INFERENCE, NOT_SERVING, SERVICE_UNKNOWN, SERVING, health_of


@pytest.mark.parametrize("name", ["", INFERENCE])
def test_the_server_and_its_service_serve_while_every_model_does(name) -> None:
    assert health_of(True, name) == SERVING
    assert health_of(False, name) == NOT_SERVING


def test_another_service_is_not_known() -> None:
    assert health_of(True, "other.Service") == SERVICE_UNKNOWN
