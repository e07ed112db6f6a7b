"""Limit how long the threads of OpenMP, with which torch computes, wait without sleeping.

After each parallel region, threads that have nothing to do spin: they ask again and again whether
there is more. On an idle machine that is faster than sleeping. Where other processes want the
cores, the spinning threads keep those that have work from running.
"""

from __future__ import annotations

import os
import sys

SPINS = "10000"
"""Times that a thread asks. The default of GNU, 300,000, is no faster on an idle machine, and 50
times as slow beside eight busy processes (`loadtest/crowded.py`)."""


def limit_spinning() -> None:
    """Set the limit, unless the environment says how threads wait, or torch is imported.

    GNU's OpenMP reads it when it is loaded, with torch; other ones ignore it.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
