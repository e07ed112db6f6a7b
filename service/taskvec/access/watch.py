"""Keys that follow their file: a change takes effect without a restart."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from taskvec.access.keys import Key, KeyRing, KeySource
from taskvec.errors import StartError

LOOK_EVERY = 2.0
"""Seconds between two looks at the file."""

log = structlog.get_logger(__name__)


class WatchedKeys:
    """The keys in force; of a file that turned bad, those that it had before."""

    def __init__(self, source: KeySource, on_change: Callable[[frozenset[str]], None]) -> None:
        """Read the keys.

        Args:
            source: where they are.
            on_change: told the names of the keys, now and whenever they change.

        Raises:
            StartError: they cannot be read.
        """
        self._source = source
        self._on_change = on_change
        self._stamp = source.stamp()
        self._ring = source.read()
        on_change(self._ring.names)

    def find(self, secret: bytes) -> Key | None:
        """The key with this secret; None where there is none."""
        return self._ring.find(secret)

    async def watch(self) -> None:
        """Look at the file every now and then; until cancelled."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await asyncio.to_thread(self._look)

    def _look(self) -> None:
        stamp = self._source.stamp()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            ring: KeyRing = self._source.read()
        except StartError as error:
            log.error("keys_not_reloaded", reason=str(error))  # noqa: TRY400 - one sentence says it
            return
        self._ring = ring
        self._on_change(ring.names)
        log.info("keys_reloaded", keys=len(ring.names))
