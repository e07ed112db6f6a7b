"""Random schedules of the service; the simulation itself: it repeats, and it finds faults.

A seed that fails is run again by ``python -m simulation --seed N``, with its course.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

import taskvec.engines.remote.engine
from conftest import repository
from simulation.mutations import MUTATIONS, Mutation
from simulation.schedule import run_schedule

pytestmark = pytest.mark.full("failures, restarts and several processes, simulated")

SCHEDULES = 200
"""Schedules of a test run; `make simulate` runs ten thousand."""

QUICKLY_FOUND = {
    "an admitted request gives no tokens back",
    "a caller that has gone is answered",
    "a waiting engine is not woken",
    "a call of a crashed server is not sent again",
    "the callers of a shared call get each other's vectors",
}
"""Mutations that are found within ``MUTATION_SCHEDULES``; docs/adr/0023 has all."""

MUTATION_SCHEDULES = 40


@pytest.mark.parametrize("first", range(0, SCHEDULES, 50))
def test_random_schedules_keep_all_promises(first: int) -> None:
    """Whatever the schedule, every request ends once and rightly, and every count at zero."""
    answered = 0
    for seed in range(first, first + 50):
        report = run_schedule(seed)
        assert report.failures == [], f"seed {seed}\n" + "\n".join(report.log)
        answered += report.outcomes["answered"]
    assert answered > 100


def test_a_seed_gives_the_same_course_in_another_process() -> None:
    """A seed that failed fails again, whatever the addresses of objects and hashes of strings."""
    code = (
        "from simulation.schedule import run_schedule\n"
        "print([run_schedule(seed).course for seed in range(8)])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", code]
    other = subprocess.run(
        command, cwd=repository(), env=environment, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == str([run_schedule(seed).course for seed in range(8)])


@pytest.mark.parametrize(
    "mutation", [m for m in MUTATIONS if m.name in QUICKLY_FOUND], ids=lambda m: m.name
)
def test_a_fault_in_the_code_is_found(mutation: Mutation) -> None:
    """With a fault, a schedule fails that does not fail without it."""
    servers = taskvec.engines.remote.engine.PoolServer
    with mutation.applied():
        assert any(run_schedule(seed).failures for seed in range(MUTATION_SCHEDULES))
    gc.collect()  # what a schedule that was stuck has left behind
    assert taskvec.engines.remote.engine.PoolServer is servers


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_every_mutation_fits_the_code(mutation: Mutation) -> None:
    """A mutation names source that exists; the recorded ones are tried by --mutations."""
    with mutation.applied():
        pass
