"""The thresholds of the load test."""

from __future__ import annotations

from typing import Any

import pytest

from thresholds import Level, missed_thresholds, percentile, small_samples


def level(**changed: Any) -> Level:
    """Return figures that meet all thresholds, except for changed ones."""
    figures: dict[str, Any] = {
        "load": 0.5,
        "offered": 10.0,
        "answered": 10.0,
        "texts": 10.0,
        "requests": 600,
        "outcomes": {"200": 600},
        "p50_ms": 5.0,
        "p90_ms": 8.0,
        "p99_ms": 20.0,
        "late_p99_ms": 0.5,
        "generator_cores": 0.1,
    }
    return Level(**(figures | changed))


def test_a_good_level_misses_no_threshold() -> None:
    """A level with successful and fast requests misses no threshold."""
    assert missed_thresholds("interactive", [level()], p99_ms=20.0) == []


def test_latency_is_checked_up_to_half_of_the_capacity() -> None:
    """A p99 over the maximum is reported, but only up to half of the capacity."""
    slow = [level(load=load, p99_ms=21.0) for load in (0.25, 0.5, 0.75)]
    sentences = missed_thresholds("interactive", slow, p99_ms=20.0)
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "interactive at 0.25 of the capacity",
        "interactive at 0.50 of the capacity",
    ]
    assert "21 ms, over 20 ms" in sentences[0]


@pytest.mark.parametrize("outcome", ["0", "400", "429", "500", "wrong"])
def test_an_unexpected_outcome_is_reported(outcome: str) -> None:
    """One unexpected outcome is enough; at half of the capacity a 429 is unexpected."""
    (sentence,) = missed_thresholds("bulk", [level(outcomes={"200": 599, outcome: 1})], p99_ms=20.0)
    assert f"1 times {outcome}" in sentence


def test_an_overloaded_server_may_reject_but_not_fail() -> None:
    """Above the capacity a 429 is expected and a 503 is not."""
    refused = level(load=1.2, outcomes={"200": 500, "429": 100})
    failed = level(load=1.2, outcomes={"200": 500, "503": 100})
    assert missed_thresholds("bulk", [refused], p99_ms=20.0) == []
    assert len(missed_thresholds("bulk", [failed], p99_ms=20.0)) == 1


def test_a_level_without_successful_requests_is_reported() -> None:
    """A level with nothing but 429 is reported, though it has no latency."""
    nothing = level(load=1.2, outcomes={"429": 600}, p50_ms=None, p90_ms=None, p99_ms=None)
    (sentence,) = missed_thresholds("bulk", [nothing], p99_ms=20.0)
    assert "no request succeeded" in sentence


def test_percentiles_are_measured_values() -> None:
    """A percentile is one of the values, unrounded, and None without values."""
    values = [float(number) for number in range(200, 0, -1)]
    assert percentile(values, 0.5) == 101.0
    assert percentile(values, 0.99) == 199.0
    assert percentile([3.25], 0.99) == 3.25
    assert percentile([], 0.5) is None


def test_a_p99_of_few_requests_is_reported() -> None:
    """Below 100 requests the 99th percentile is only the maximum."""
    assert len(small_samples("bulk", [level(requests=99), level(requests=100)])) == 1
