"""Memory that a process retains after it was freed, measured in page faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROBE = """
import json, resource, sys
from taskvec import malloc
from taskvec.malloc import tune_malloc, trim_malloc

parameters, size = getattr(malloc, sys.argv[1]), int(sys.argv[2])

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(max(5, 30_000_000 // size)):
        blocks = [bytearray(size) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before = faults()
tune_malloc(parameters)
faults()
after = faults()
pieces = [bytearray(20_000) for _ in range(5_000)]
full = resident()
del pieces[:-1]
trim_malloc()
print(json.dumps({"before": before, "after": after, "returned": full - resident()}))
"""


def probe(parameters: str, size: int, **environment: str) -> dict[str, int]:
    """Return page faults before and after tuning, and bytes returned by trimming.

    Args:
        parameters: name of the malloc parameters to set.
        size: bytes of the blocks that the process allocates and frees.
        environment: further environment variables of the process.
    """
    run = subprocess.run(
        [sys.executable, "-c", PROBE, parameters, str(size)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    found: dict[str, int] = json.loads(run.stdout)
    return found


def test_responses_need_no_new_pages() -> None:
    """Blocks of a response's size reuse retained memory, and trimming returns most of it."""
    seen = probe("SERVING", 300_000)
    assert seen["before"] > 1000
    assert seen["after"] < seen["before"] / 20
    assert seen["returned"] > 50_000_000


def test_training_steps_need_no_new_pages() -> None:
    """Blocks of a training step's size reuse memory, though glibc would map them by itself."""
    seen = probe("TRAINING", 40_000_000)
    assert seen["before"] > 100
    assert seen["after"] < seen["before"] / 20


def test_the_environment_wins() -> None:
    """Thresholds that the environment sets are not changed."""
    seen = probe(
        "SERVING", 300_000, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072"
    )
    assert seen["after"] > seen["before"] / 2
