"""How long the threads of OpenMP spin, as GNU's library says when torch has loaded it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from taskvec.openmp import SPINS

LOADING = [
    "from taskvec import Embedder; Embedder('taskvec-mini').close()",
    "import taskvec.engines.packed.engine",
    "import taskvec_train.loop",
]


def spins(code: str, **variables: str) -> str:
    """Return the number of spins that OpenMP takes from the environment of a process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **variables}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if found is None:
        pytest.skip("torch has another OpenMP library than GNU's here")
    return found[1]


@pytest.mark.parametrize("code", LOADING)
def test_threads_spin_for_a_moment(code: str) -> None:
    """The limit is set before torch is imported, by the service, the library and training."""
    assert spins(code) == SPINS


def test_the_environment_decides() -> None:
    """Operators set the number of spins, or the policy from which OpenMP derives it."""
    assert spins(LOADING[1], GOMP_SPINCOUNT="77") == "77"
    assert spins(LOADING[1], OMP_WAIT_POLICY="PASSIVE") == "0"
