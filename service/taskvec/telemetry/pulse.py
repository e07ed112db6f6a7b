"""A timer that tells how late the event loop runs."""

from __future__ import annotations

import asyncio
import time

from taskvec.telemetry.metrics import Metrics

EVERY = 0.25
"""Seconds between two beats."""


async def keep_time(metrics: Metrics) -> None:
    """Report how late each beat is, and renew the ages that change by themselves; never ends."""
    while True:
        due = time.monotonic() + EVERY
        await asyncio.sleep(EVERY)
        metrics.loop_late(max(0.0, time.monotonic() - due))
        metrics.let_time_pass()
