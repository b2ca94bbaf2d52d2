"""Schemathesis over the REST side: what its OpenAPI page promises is what comes back, and nothing brings out a 500."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("httptools", reason="needs the extra 'serve'")
pytest.importorskip("schemathesis", reason="needs schemathesis: pip install schemathesis")

import schemathesis
from schemathesis.specs.openapi.checks import positive_data_acceptance

from hasten.serve import openapi
from hasten.serve.app import Listening, Open
from serve.bundles import bundle
from serve.served import call, infer_body, rows_of, served

FITS_THE_MODEL = [positive_data_acceptance]
"""What no page can promise: that a request of the right form is also one of the model's, or of memory that is there."""

PLACES = [(path, known.verb) for known in openapi.CALLS.values() for path in known.paths]


@pytest.fixture(scope="module", params=["fast", "library"])
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    models = tmp_path_factory.mktemp("openapi") / "models"
    bundle(models / "net")
    with served(models, Listening(port=0, grpc_port=None, transport=request.param)) as found:
        yield found


@pytest.fixture(scope="module")
def schema(opened: Open) -> Any:
    return schemathesis.openapi.from_url(f"{opened.http}/openapi.json")


@pytest.mark.parametrize(("path", "verb"), PLACES)
def test_an_operation_answers_as_its_page_says(opened: Open, schema: Any, path: str, verb: str) -> None:
    operation = schema[path][verb]

    @settings(
        max_examples=30,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(case=operation.as_strategy())
    def answers(case: Any) -> None:
        if path.endswith("/infer"):
            case.path_parameters["model"] = "net"
            if "version" in case.path_parameters:
                case.path_parameters["version"] = "1"
        case.call_and_validate(base_url=opened.http, timeout=30, excluded_checks=FITS_THE_MODEL)

    answers()
    assert call(opened.http, "POST", "/v2/models/net/infer", infer_body(rows_of(1)))[0] == 200
