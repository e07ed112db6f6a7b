"""Vector store that trusts vectors of engine servers only after the servers have been checked."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

from taskvec.cache.embeddings import VectorStore
from taskvec.cache.memory import ENTRY_BYTES

MAX_PENDING_BYTES = 32 << 20
"""Bytes of entries that wait for a check; later ones are not stored."""


class ProvenStore:
    """Keeps new entries apart until the servers pass a check that began after they were computed.

    Until then they are found in this process, as fresh answers would be; if a server fails first,
    they are forgotten, so that the store never has vectors of a server that has become wrong.
    """

    def __init__(self, store: VectorStore) -> None:
        """Wrap a store, which gets the entries after the check."""
        self._store = store
        self._pending: dict[bytes, tuple[float, bytes]] = {}
        self._bytes = 0
        self._failed_at = -math.inf

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """See ``VectorStore``."""
        found = await self._store.get(keys)
        if not self._pending:
            return found
        waiting = [self._pending.get(key) for key in keys]
        return [
            value if entry is None else entry[1]
            for value, entry in zip(found, waiting, strict=True)
        ]

    def put(self, entries: Mapping[bytes, bytes], since: float | None = None) -> None:
        """See ``VectorStore``; entries that were being computed at a failure are dropped."""
        now = time.monotonic()
        if since is not None and since <= self._failed_at:
            return
        for key, value in entries.items():
            if key not in self._pending and self._bytes < MAX_PENDING_BYTES:
                self._bytes += ENTRY_BYTES + len(value)
                self._pending[key] = (now, value)

    async def close(self) -> None:
        """See ``VectorStore``; what has not been checked is lost."""
        await self._store.close()

    def servers_proven(self, since: float) -> None:
        """Store the entries that are older than a time: all servers passed checks begun after it.

        Args:
            since: ``time.monotonic()`` at the start of the oldest of these checks.
        """
        proven = {key: value for key, (at, value) in self._pending.items() if at < since}
        for key, value in proven.items():
            del self._pending[key]
            self._bytes -= ENTRY_BYTES + len(value)
        if proven:
            self._store.put(proven, since)

    def server_failed(self) -> None:
        """Forget the entries that have not been checked, and those that are being computed."""
        self._failed_at = time.monotonic()
        self._pending.clear()
        self._bytes = 0
