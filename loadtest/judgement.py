"""What a level of load showed, and whether that is good enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

HALF = 0.5
"""Share of the capacity up to which the latency is judged: beyond, queues of any server grow."""

FULL = 0.9
"""Share of the capacity from which a 429 is a right answer: the capacity is only known so well."""

ENOUGH = 100
"""Answers without which there is no 99th percentile."""


@dataclass(frozen=True, slots=True)
class Level:
    """One open-loop run.

    Attributes:
        load: the offered rate as a share of the capacity.
        offered: requests a second in the schedule.
        answered: good answers a second.
        texts: texts a second in good answers.
        requests: number of all requests.
        outcomes: number by status, see ``drive.Seen``.
        p50_ms, p90_ms, p99_ms: of good answers, from the moment they were due; None without any.
        late_p99_ms: how late the generator sent; it is part of the latencies.
        generator_cores: processor time of the generator a second.
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
        """For a result's file."""
        return {
            name: round(value, 2) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least value that this share of all does not exceed; None where there is none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def broken(name: str, levels: Sequence[Level], p99_ms: float) -> list[str]:
    """A sentence for each threshold that was missed.

    Args:
        name: of the scenario.
        levels: what was seen.
        p99_ms: bound of the latency up to half of the capacity.
    """
    sentences = []
    for level in levels:
        place = f"{name} at {level.load:.2f} of the capacity"
        expected = {"200", "429"} if level.load >= FULL else {"200"}
        unexpected = {kind: n for kind, n in level.outcomes.items() if kind not in expected}
        if unexpected:
            kinds = ", ".join(f"{n} times {kind}" for kind, n in sorted(unexpected.items()))
            sentences.append(f"{place}: unexpected answers, {kinds}.")
        if not level.outcomes.get("200"):
            sentences.append(f"{place}: nothing was answered.")
        elif level.load <= HALF and level.p99_ms is not None and level.p99_ms > p99_ms:
            sentences.append(
                f"{place}: the 99th percentile is {level.p99_ms:.0f} ms, over {p99_ms:.0f} ms."
            )
    return sentences


def too_few(name: str, levels: Sequence[Level]) -> list[str]:
    """A sentence for each level whose 99th percentile is only its worst answer."""
    return [
        f"{name} at {level.load:.2f} of the capacity: only {level.requests} requests, so that the "
        "p99 is the worst of them: measure for longer."
        for level in levels
        if level.requests < ENOUGH
    ]
