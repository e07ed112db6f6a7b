"""What an answer cache keeps its vectors in, and whom it tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class CacheObserver(Protocol):
    """Who is told how the cache does."""

    def cache_asked(self, *, hits: int, misses: int, hit_tokens: int) -> None:
        """So many texts were found, so many not."""

    def cache_holds(self, size: int) -> None:
        """The cache in memory now takes so many bytes."""

    def cache_failed(self) -> None:
        """Redis did not answer, or had no time to keep something."""


class VectorStore(Protocol):
    """Keeps bytes under keys, for as long as it has room; never fails, but forgets."""

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """What is kept under each key; None where nothing is."""

    def put(self, entries: Mapping[bytes, bytes]) -> None:
        """Keep something, if that is possible; does not wait."""

    async def close(self) -> None:
        """Finish, and let go of connections."""
