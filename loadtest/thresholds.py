"""Figures of one level of load, and the thresholds they are checked against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

LATENCY_MAX_LOAD = 0.5
"""Fraction of the capacity up to which the latency is checked: above, any server's queue grows."""

REFUSAL_MIN_LOAD = 0.9
"""Fraction of the capacity from which status 429 is expected; below 1, because measurements of the
capacity vary."""

MIN_REQUESTS = 100
"""Minimum number of requests for a meaningful 99th percentile."""


@dataclass(frozen=True, slots=True)
class Level:
    """Figures of one open-loop run.

    Attributes:
        load: offered rate as a fraction of the capacity.
        offered: scheduled requests per second.
        answered: successful requests per second.
        texts: texts per second in successful requests.
        requests: number of all requests.
        outcomes: number of requests by status, see ``drive.RunResult``.
        p50_ms, p90_ms, p99_ms: latencies of successful requests from the scheduled time; None if
            there were none.
        late_p99_ms: delay of the generator, which is part of the latencies.
        generator_cores: CPU seconds of the generator per second.
    """

    load: float
    offered: float
    answered: float
    texts: float
    requests: int
    outcomes: Mapping[str, int]
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    late_p99_ms: float | None
    generator_cores: float

    def figures(self) -> dict[str, Any]:
        """Return the rounded figures for a result file."""
        return {
            name: round(value, 2) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return a percentile, as one of the values; None if there are no values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def missed_thresholds(name: str, levels: Sequence[Level], p99_ms: float) -> list[str]:
    """Return one sentence per missed threshold.

    Args:
        name: name of the scenario.
        levels: figures of each level.
        p99_ms: maximum 99th percentile at levels up to ``LATENCY_MAX_LOAD``.
    """
    sentences = []
    for level in levels:
        where = f"{name} at {level.load:.2f} of the capacity"
        expected = {"200", "429"} if level.load >= REFUSAL_MIN_LOAD else {"200"}
        unexpected = {kind: n for kind, n in level.outcomes.items() if kind not in expected}
        if unexpected:
            kinds = ", ".join(f"{n} times {kind}" for kind, n in sorted(unexpected.items()))
            sentences.append(f"{where}: unexpected outcomes, {kinds}.")
        if not level.outcomes.get("200"):
            sentences.append(f"{where}: no request succeeded.")
        elif level.load <= LATENCY_MAX_LOAD and level.p99_ms is not None and level.p99_ms > p99_ms:
            sentences.append(
                f"{where}: the 99th percentile is {level.p99_ms:.0f} ms, over {p99_ms:.0f} ms."
            )
    return sentences


def small_samples(name: str, levels: Sequence[Level]) -> list[str]:
    """Return one sentence per level with too few requests for a 99th percentile."""
    return [
        f"{name} at {level.load:.2f} of the capacity: only {level.requests} requests, so the p99 "
        "is the maximum: measure for longer."
        for level in levels
        if level.requests < MIN_REQUESTS
    ]
