"""Vector store in this process's memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from taskvec.cache.embeddings import CacheObserver

ENTRY_BYTES = 256
"""Overhead of an entry in bytes: its key, its slot in the dictionary and the Python objects."""


class MemoryStore:
    """LRU store in memory, limited by size in bytes."""

    def __init__(self, max_bytes: int, observer: CacheObserver) -> None:
        """Create an empty store.

        Args:
            max_bytes: the least recently used entries are evicted beyond this size.
            observer: notified of the size after each write.
        """
        self._max_bytes = max_bytes
        self._observer = observer
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        self._bytes = 0

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """See ``VectorStore``."""
        for key in keys:
            if key in self._entries:
                self._entries.move_to_end(key)
        return [self._entries.get(key) for key in keys]

    def put(
        self,
        entries: Mapping[bytes, bytes],
        since: float | None = None,  # noqa: ARG002 - every entry is stored
    ) -> None:
        """See ``VectorStore``."""
        for key, value in entries.items():
            before = self._entries.pop(key, None)
            if before is not None:
                self._bytes -= ENTRY_BYTES + len(before)
            self._entries[key] = value
            self._bytes += ENTRY_BYTES + len(value)
        while self._bytes > self._max_bytes:
            _, value = self._entries.popitem(last=False)
            self._bytes -= ENTRY_BYTES + len(value)
        self._observer.cache_size(self._bytes)

    async def close(self) -> None:
        """See ``VectorStore``."""
