"""A deployment file that is none is one clear line."""

import pytest

from hasten.deployment import parse_deployment
from hasten.errors import StoreError


@pytest.mark.parametrize("data", [b"\x08\x0a\x80 no text at all", b"name = ", b'name = "net"\n', b""])
def test_a_file_that_is_no_deployment_is_told_by_its_path(data, tmp_path) -> None:
    (tmp_path / "deployment.toml").write_bytes(data)
    with pytest.raises(StoreError, match=r"deployment\.toml"):
        parse_deployment(tmp_path / "deployment.toml")


def test_a_file_that_is_not_there_is_told_by_its_path(tmp_path) -> None:
    with pytest.raises(StoreError, match=r"none\.toml"):
        parse_deployment(tmp_path / "none.toml")
