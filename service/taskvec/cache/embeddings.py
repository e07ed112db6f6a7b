"""The answer cache: the vector of a text that was embedded before, by its token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from taskvec.engines.base import TokenIds

KEY_BYTES = 32


@dataclass(frozen=True, slots=True, eq=False)
class CacheLookup:
    """What the cache knows of a batch.

    Attributes:
        keys: of each text.
        vectors: float32 [texts, dimension]; rows of unknown texts hold nothing yet.
        unknown: places of the texts that have to be embedded.
    """

    keys: Sequence[bytes]
    vectors: NDArray[np.float32]
    unknown: Sequence[int]


class EmbeddingCache:
    """Gives back what an engine gave: whole vectors, before they are cut, scaled and quantised."""

    def __init__(
        self,
        store: VectorStore,
        *,
        identity: bytes,
        dimension: int,
        shared: bool,
        observer: CacheObserver,
    ) -> None:
        """Wire it.

        Args:
            store: where vectors are kept.
            identity: names the model's weights and the arithmetic: vectors of others are others.
            dimension: width of the vectors.
            shared: True lets an API key's texts be answered by what another's gave.
            observer: told of hits and misses.
        """
        self._store = store
        self._identity = identity
        self._dimension = dimension
        self._shared = shared
        self._observer = observer

    async def recall(
        self, ids: Sequence[TokenIds], adapter: str | None, owner: str | None
    ) -> CacheLookup:
        """Look a batch up.

        Args:
            ids: one int32 array a text.
            adapter: what they are embedded with.
            owner: name of the API key; None where there is none.
        """
        scope = self._scope(adapter, owner)
        keys = [
            hashlib.blake2b(text.data, digest_size=KEY_BYTES, key=scope).digest() for text in ids
        ]
        found = await self._store.get(keys)
        vectors = np.empty((len(ids), self._dimension), dtype=np.float32)
        unknown = []
        known_tokens = 0
        for place, value in enumerate(found):
            if value is not None and len(value) == vectors.strides[0]:
                vectors[place] = np.frombuffer(value, dtype="<f4")
                known_tokens += len(ids[place])
            else:
                unknown.append(place)
        self._observer.cache_asked(
            hits=len(ids) - len(unknown), misses=len(unknown), hit_tokens=known_tokens
        )
        return CacheLookup(keys, vectors, unknown)

    def keep(self, recall: CacheLookup) -> None:
        """Remember what was unknown, now that ``vectors`` has it."""
        rows = np.ascontiguousarray(recall.vectors, dtype="<f4")
        self._store.put({recall.keys[place]: rows[place].tobytes() for place in recall.unknown})

    async def close(self) -> None:
        """Let go of the store."""
        await self._store.close()

    def _scope(self, adapter: str | None, owner: str | None) -> bytes:
        """A hash key: what else than the ids an answer depends on, and who may see it."""
        whose = "" if self._shared or owner is None else f"key {owner}"
        how = "base" if adapter is None else f"adapter {adapter}"
        depends = self._identity + f"\0{how}\0{whose}".encode()
        return hashlib.blake2b(depends, digest_size=KEY_BYTES).digest()


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
