from dataclasses import replace

import pytest
from synthetic_result import make_bound, make_measurement

from hasten.cli.measure import Figures, Measured, remark_lines
from hasten.report.remarks import (
    grouped,
    limit_remarks,
    profile_remarks,
    timing_remarks,
    winograd_limit,
    winograd_remarks,
)


def test_a_warm_up_that_ran_out_of_time_is_said() -> None:
    latency = make_measurement(1e6).latency
    assert timing_remarks(latency) == []
    assert timing_remarks(replace(latency, settled=False)) == ["never settled while warming up"]


def test_what_a_limit_does_not_count_is_named() -> None:
    bound = make_bound(1e6)
    assert limit_remarks(replace(bound, unpriced=("TopK", "NonZero"))) == [
        "its limit counts no arithmetic for NonZero, TopK, only bytes"
    ]
    assert limit_remarks(replace(bound, unpriced=())) == limit_remarks(None) == []


def test_operator_times_that_were_scaled_say_so_and_why() -> None:
    bound = make_bound(1e6)
    assert profile_remarks(bound) == []
    (said,) = profile_remarks(replace(bound, profile_scale=0.87))
    assert "87 %" in said
    assert "profiling takes time itself" in said


def test_a_second_limit_is_one_only_where_it_is_lower() -> None:
    bound = make_bound(1e6)
    assert winograd_limit(bound) == (bound.winograd_ns, pytest.approx(0.6 * bound.efficiency))
    assert winograd_limit(replace(bound, winograd_ns=None)) is None
    assert winograd_limit(replace(bound, winograd_ns=bound.grouped_ns)) is None
    assert winograd_remarks(None) == []


def test_one_remark_about_several_is_written_once() -> None:
    assert grouped([("a", ["x", "y"]), ("b", ["x"]), ("c", [])]) == ["a, b: x.", "a: y."]
    assert grouped([("a", ["x"]), ("b", ["x"])]) == ["all: x."]
    assert grouped([("a", ["x"])]) == ["a: x."]


def test_measure_writes_the_remarks_of_its_engines_below_the_figures() -> None:
    taken = make_measurement(1e6)
    assert taken.bound
    calm = Measured(engine="calm", latency=taken.latency, over_first=None, resources=taken.resources, bound=taken.bound)
    restless = replace(calm, engine="restless", latency=replace(taken.latency, settled=False))
    lines = remark_lines(Figures(measured=(calm, restless), failures={}, conditions=taken.conditions))
    assert "restless: never settled while warming up." in lines
    assert "all: its limit counts no arithmetic for TopK, only bytes." in lines
    assert sum("Winograd" in line for line in lines) == 1
