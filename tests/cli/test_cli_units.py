import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.cli import units
from hasten.errors import InvalidSetting
from hasten.plan import Part


@pytest.mark.parametrize(
    ("text", "value"),
    [("5ms", 5e-3), ("90s", 90.0), ("20m", 1200.0), ("1.5h", 5400.0), ("250us", 250e-6), ("3 min", 180.0)],
)
def test_a_duration_is_read_in_seconds(text: str, value: float) -> None:
    assert units.seconds(text) == pytest.approx(value)


def test_nanoseconds_are_whole_where_the_text_was() -> None:
    assert units.nanoseconds("5ms") == 5_000_000


@pytest.mark.parametrize("text", ["5", "ms", "-5ms", "0s", "5 parsecs", "", "1e400s5"])
def test_a_duration_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"as 5ms, 90s or 20m"):
        units.seconds(text)


@pytest.mark.parametrize(("text", "value"), [("0s", 0.0), ("0", 0.0), ("0ms", 0.0), ("5ms", 5e-3), ("1.5h", 5400.0)])
def test_a_duration_that_may_be_none_is_read(text: str, value: float) -> None:
    assert units.seconds_or_none(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["5", "-0s", "0 parsecs", "none"])
def test_a_duration_that_may_be_none_has_its_unit_all_the_same(text: str) -> None:
    with pytest.raises(ValueError, match=r"as 5ms, 90s or 20m"):
        units.seconds_or_none(text)


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5%", 0.005), ("0.01", 0.01), ("0", 0.0), ("100 %", 1.0)])
def test_a_share_is_read_with_or_without_its_sign(text: str, value: float) -> None:
    assert units.share(text) == value


@pytest.mark.parametrize("text", ["1", "100%", "0.3"])
def test_a_share_up_to_one_is_taken(text: str) -> None:
    assert 0 < units.share(text) <= 1


@pytest.mark.parametrize("text", ["2", "101%", "one", "1pt", "-1%"])
def test_a_share_beyond_one_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"1% or 0\.01"):
        units.share(text)


@pytest.mark.parametrize(("text", "value"), [("5MB", 5_000_000), ("500kB", 500_000), ("1GiB", 1 << 30), ("10B", 10)])
def test_a_size_is_read_in_bytes(text: str, value: int) -> None:
    assert units.size(text) == value


@pytest.mark.parametrize("text", ["5", "5Mb", "MB", "0MB"])
def test_a_size_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="as 500kB, 5MB or 1GiB"):
        units.size(text)


def test_lists_are_read_at_their_commas() -> None:
    assert units.numbers("1, 2,4") == (1, 2, 4)
    assert units.words("onnxruntime,openvino") == ("onnxruntime", "openvino")


@pytest.mark.parametrize("text", ["1,,2", "0", "1.5", "two", "-1"])
def test_a_list_of_numbers_without_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"name|numbers"):
        units.numbers(text)


def test_a_part_is_a_name_with_settings() -> None:
    assert units.part("fold") == Part("fold")
    assert units.part("quantize-static:observer=mse,percentile=99.9") == Part(
        "quantize-static", {"observer": "mse", "percentile": "99.9"}
    )


def test_a_value_in_brackets_is_json_with_commas_of_its_own() -> None:
    assert units.part('quantize-static:exclude=["/a,b","/c"],observer=mse').settings == {
        "exclude": ["/a,b", "/c"],
        "observer": "mse",
    }


@pytest.mark.parametrize("text", ["fold:", "fold:batch_norm", "fold:=3", "fold:exclude=[1"])
def test_settings_without_sense_are_refused_with_the_way_to_write_them(text: str) -> None:
    with pytest.raises(InvalidSetting, match="write it as fold:key=value"):
        units.part(text)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.from_regex(r"[a-z0-9./]{1,8}", fullmatch=True), min_size=1
    )
)
def test_written_pairs_are_read_back(pairs: dict[str, str]) -> None:
    assert units.pairs(",".join(f"{key}={value}" for key, value in pairs.items())) == pairs


def test_a_seed_is_a_whole_number_from_zero_on() -> None:
    assert [units.seed(text) for text in ("0", "17", "99999999999")] == [0, 17, 99999999999]
    for text in ("-1", "1.5", "", "one"):
        with pytest.raises(ValueError, match="whole number, 0 or above"):
            units.seed(text)
