"""Thresholds of the load test."""

from __future__ import annotations

from typing import Any

import pytest

from judgement import Level, broken, percentile, too_few


def level(**changed: Any) -> Level:
    """A level at which all is well, or with some of it changed."""
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


def test_a_level_at_which_all_is_well_breaks_nothing() -> None:
    """All answered, in time."""
    assert broken("interactive", [level()], p99_ms=20.0) == []


def test_a_latency_over_its_bound_is_told_up_to_half_of_the_capacity() -> None:
    """Beyond it, queues grow whatever a server does."""
    slow = [level(load=load, p99_ms=21.0) for load in (0.25, 0.5, 0.75)]
    sentences = broken("interactive", slow, p99_ms=20.0)
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "interactive at 0.25 of the capacity",
        "interactive at 0.50 of the capacity",
    ]
    assert "21 ms, over 20 ms" in sentences[0]


@pytest.mark.parametrize("outcome", ["0", "400", "429", "500", "wrong"])
def test_an_answer_that_is_not_expected_is_told(outcome: str) -> None:
    """One of six hundred is enough, and a server that is half busy must not refuse."""
    (sentence,) = broken("bulk", [level(outcomes={"200": 599, outcome: 1})], p99_ms=20.0)
    assert f"1 times {outcome}" in sentence


def test_a_full_server_may_refuse_but_not_fail() -> None:
    """A 429 is a right answer to more than it bears; a 503 is not."""
    refused = level(load=1.2, outcomes={"200": 500, "429": 100})
    failed = level(load=1.2, outcomes={"200": 500, "503": 100})
    assert broken("bulk", [refused], p99_ms=20.0) == []
    assert len(broken("bulk", [failed], p99_ms=20.0)) == 1


def test_a_server_that_only_refuses_is_told() -> None:
    """There is no latency to judge then."""
    nothing = level(load=1.2, outcomes={"429": 600}, p50_ms=None, p90_ms=None, p99_ms=None)
    (sentence,) = broken("bulk", [nothing], p99_ms=20.0)
    assert "nothing was answered" in sentence


def test_percentiles_are_values_that_were_seen() -> None:
    """No rounding to two digits, as in locust's own; none of nothing."""
    values = [float(number) for number in range(200, 0, -1)]
    assert percentile(values, 0.5) == 101.0
    assert percentile(values, 0.99) == 199.0
    assert percentile([3.25], 0.99) == 3.25
    assert percentile([], 0.5) is None


def test_a_p99_of_few_answers_is_told() -> None:
    """It is only the worst of them."""
    assert len(too_few("bulk", [level(requests=99), level(requests=100)])) == 1
