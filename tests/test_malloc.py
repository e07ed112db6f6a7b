"""What the process keeps of freed memory, seen from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROBE = """
import json, resource, sys
from taskvec import malloc
from taskvec.malloc import tune_malloc, trim_malloc

choices, size = getattr(malloc, sys.argv[1]), int(sys.argv[2])

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(max(5, 30_000_000 // size)):
        blocks = [bytearray(size) for _ in range(4)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

before = faults()
tune_malloc(choices)
faults()
kept = faults()
pieces = [bytearray(20_000) for _ in range(5_000)]
full = resident()
del pieces[:-1]
trim_malloc()
print(json.dumps({"before": before, "kept": kept, "given": full - resident()}))
"""


def probe(choices: str, size: int, **environment: str) -> dict[str, int]:
    """What a fresh process saw that takes and frees blocks of so many bytes."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE, choices, str(size)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | environment,
    )
    found: dict[str, int] = json.loads(run.stdout)
    return found


def test_answers_take_no_new_pages() -> None:
    """Blocks of an answer's size come from memory that is kept; much of it can be given back."""
    seen = probe("SERVING", 300_000)
    assert seen["before"] > 1000
    assert seen["kept"] < seen["before"] / 20
    assert seen["given"] > 50_000_000


def test_steps_of_training_take_no_new_pages() -> None:
    """Nor do blocks of a step's size, which glibc takes from the system whatever its thresholds."""
    seen = probe("TRAINING", 40_000_000)
    assert seen["before"] > 100
    assert seen["kept"] < seen["before"] / 20


def test_the_environment_decides() -> None:
    """Who has set malloc's thresholds keeps them."""
    seen = probe(
        "SERVING", 300_000, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072"
    )
    assert seen["kept"] > seen["before"] / 2
