"""A deployment file that is none is one clear line."""

import pytest

from hasten.deployment import parse_deployment, read_deployment, write_deployment
from hasten.errors import BadInput, StoreError
from hasten.testing.deployments import deployed
from hasten.testing.models import mlp


@pytest.mark.parametrize(
    "data", [b"\x08\x0a\x80 no text at all", b"name = ", b'name = "net"\n', b"", b"serving = 3", b"serving = [1]"]
)
def test_a_file_that_is_no_deployment_is_told_by_its_path(data, tmp_path) -> None:
    (tmp_path / "deployment.toml").write_bytes(data)
    with pytest.raises(StoreError, match=r"deployment\.toml"):
        parse_deployment(tmp_path / "deployment.toml")


def test_a_file_that_is_not_there_is_told_by_its_path(tmp_path) -> None:
    with pytest.raises(StoreError, match=r"none\.toml"):
        parse_deployment(tmp_path / "none.toml")


def test_a_bundle_does_not_replace_what_is_no_bundle(tmp_path) -> None:
    deployment, artifact = read_deployment(deployed(mlp(), tmp_path / "net"))
    other = deployed(mlp(), tmp_path / "models" / "other")
    (tmp_path / "file").write_text("of another's")
    for place in (tmp_path / "models", tmp_path / "file"):
        with pytest.raises(BadInput, match="is no bundle"):
            write_deployment(deployment, artifact, place)
    assert read_deployment(other)
    assert (tmp_path / "file").read_text() == "of another's"


def test_steps_can_be_written_behind_the_rest_of_a_file(tmp_path) -> None:
    path = deployed(mlp(), tmp_path / "net")
    with path.open("a") as file:
        file.write('\n[[post]]\nstep = "softmax"\ninput = "y"\n')
    deployment, artifact = read_deployment(path)
    assert deployment.post == ({"step": "softmax", "input": "y"},)
    again, _ = read_deployment(write_deployment(deployment, artifact, tmp_path / "again"))
    assert (again.pre, again.post) == ((), deployment.post)
