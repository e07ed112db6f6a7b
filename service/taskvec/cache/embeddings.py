"""The answer cache: finds the vector of a text that was embedded before by its token ids."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from taskvec.engines.base import TokenIds

KEY_BYTES = 32
"""Length of a cache key in bytes: long enough that two texts never share one by chance."""


class VectorStore(Protocol):
    """Key-value store of bytes. It may lose entries, but its methods never raise."""

    async def get(self, keys: Sequence[bytes]) -> Sequence[bytes | None]:
        """Return the value of each key; None for a key without an entry."""

    def put(self, entries: Mapping[bytes, bytes], since: float | None = None) -> None:
        """Store the entries if possible; returns at once.

        Args:
            entries: value of each key.
            since: ``time.monotonic()`` before the values were computed; None for now.
        """

    async def close(self) -> None:
        """Finish pending writes and close the connections."""


class CacheObserver(Protocol):
    """Callbacks for the metrics of a cache."""

    def cache_lookup(self, *, hits: int, misses: int, hit_tokens: int) -> None:
        """Record one lookup: texts that were found, texts that were not, tokens of the former."""

    def cache_size(self, size: int) -> None:
        """Record the current size of the cache in memory, in bytes."""

    def cache_failed(self) -> None:
        """Record one call to Redis that failed, or one write that was skipped."""


@dataclass(frozen=True, slots=True, eq=False)
class CacheLookup:
    """Result of a lookup: the vectors that were found, and the texts still to embed.

    Attributes:
        keys: cache key of each text.
        vectors: float32 [texts, dimension]; the rows of missing texts are uninitialised until the
            caller fills them.
        missing: indices of the texts that were not found.
        looked_up_at: ``time.monotonic()``, which is before the missing vectors are computed.
    """

    keys: Sequence[bytes]
    vectors: NDArray[np.float32]
    missing: Sequence[int]
    looked_up_at: float = field(default_factory=time.monotonic)


class EmbeddingCache:
    """Cache of the engine's output: full vectors, before any post-processing."""

    def __init__(
        self,
        store: VectorStore,
        *,
        identity: bytes,
        dimension: int,
        shared: bool,
        observer: CacheObserver,
    ) -> None:
        """Create a cache on top of a store.

        Args:
            store: where vectors are stored.
            identity: names the model's weights and the arithmetic. Part of every key, because other
                weights or another number type give other vectors.
            dimension: length of a vector.
            shared: True lets all API keys share entries, False gives each API key its own.
            observer: notified of hits and misses.
        """
        self._store = store
        self._identity = identity
        self._dimension = dimension
        self._shared = shared
        self._observer = observer

    async def lookup(
        self, ids: Sequence[TokenIds], adapter: str | None, tenant: str | None
    ) -> CacheLookup:
        """Look up the vectors of a batch.

        Args:
            ids: one int32 array per text.
            adapter: adapter that embeds the texts; None for the base model.
            tenant: name of the API key; None if the service has no API keys.
        """
        scope = self._scope(adapter, tenant)
        keys = [
            hashlib.blake2b(text.data, digest_size=KEY_BYTES, key=scope).digest() for text in ids
        ]
        found = await self._store.get(keys)
        vectors = np.empty((len(ids), self._dimension), dtype=np.float32)
        missing = []
        hit_tokens = 0
        for index, value in enumerate(found):
            if value is not None and len(value) == vectors.strides[0]:
                vectors[index] = np.frombuffer(value, dtype="<f4")
                hit_tokens += len(ids[index])
            else:
                missing.append(index)
        self._observer.cache_lookup(
            hits=len(ids) - len(missing), misses=len(missing), hit_tokens=hit_tokens
        )
        return CacheLookup(keys, vectors, missing)

    def store(self, lookup: CacheLookup) -> None:
        """Store the vectors that were missing, after the caller has filled ``lookup.vectors``."""
        rows = np.ascontiguousarray(lookup.vectors, dtype="<f4")
        entries = {lookup.keys[index]: rows[index].tobytes() for index in lookup.missing}
        self._store.put(entries, lookup.looked_up_at)

    async def close(self) -> None:
        """Close the store."""
        await self._store.close()

    def _scope(self, adapter: str | None, tenant: str | None) -> bytes:
        """Return the hash key of all that a vector depends on besides the token ids.

        It includes the API key unless entries are shared: otherwise response times would show
        whether another API key sent the same text.
        """
        tenant = "" if self._shared or tenant is None else f"key {tenant}"
        weights = "base" if adapter is None else f"adapter {adapter}"
        scope = self._identity + f"\0{weights}\0{tenant}".encode()
        return hashlib.blake2b(scope, digest_size=KEY_BYTES).digest()
