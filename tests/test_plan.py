import pytest

from hasten.plan import Part


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "prune"),
        ({"widths": {"a": 8, "b": 16}}, "prune(widths=a: 8+b: 16)"),
        ({"widths": {"a": 8, "b": 16, "c": 32}}, "prune(widths=3 names adding up to 56)"),
        ({"modes": {"a": "x", "b": "y", "c": "z"}}, "prune(modes=3 names)"),
        ({"exclude": ["a", "b", "c"]}, "prune(exclude=3 names)"),
    ],
)
def test_a_part_is_written_short_however_much_it_names(settings, text) -> None:
    assert str(Part("prune", settings)) == text
