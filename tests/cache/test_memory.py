"""The store in memory: limited in size, evicts the least recently used entry."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.cache.memory import ENTRY_BYTES, MemoryStore

VALUE = bytes(100)
MAX_BYTES = 5 * (ENTRY_BYTES + len(VALUE))


class SizeObserver:
    """Observer that keeps the last size a store reported."""

    size = 0

    def cache_lookup(self, *, hits: int, misses: int, hit_tokens: int) -> None:
        raise AssertionError(f"a store reports no lookups: {hits} {misses} {hit_tokens}")

    def cache_size(self, size: int) -> None:
        self.size = size

    def cache_failed(self) -> None:
        raise AssertionError("memory does not fail")


@pytest.mark.anyio
async def test_the_least_recently_used_entry_is_evicted() -> None:
    """Where five entries fit, a sixth one evicts the entry that was not read."""
    store = MemoryStore(MAX_BYTES, SizeObserver())
    for name in b"abcde":
        store.put({bytes([name]): VALUE})
    assert await store.get([b"a", b"x"]) == [VALUE, None]
    store.put({b"f": VALUE})
    assert await store.get([b"a", b"b", b"c", b"f"]) == [VALUE, None, VALUE, VALUE]


@pytest.mark.anyio
async def test_an_entry_over_the_limit_is_not_stored() -> None:
    """An entry larger than the whole limit leaves an empty store."""
    observer = SizeObserver()
    store = MemoryStore(MAX_BYTES, observer)
    store.put({b"a": bytes(MAX_BYTES)})
    assert await store.get([b"a"]) == [None]
    assert observer.size == 0


@given(
    puts=st.lists(
        st.dictionaries(st.binary(min_size=1, max_size=1), st.binary(max_size=900), max_size=9),
        max_size=30,
    )
)
def test_the_size_is_limited(puts: list[dict[bytes, bytes]]) -> None:
    """For any writes, the reported size is that of the entries and never over the limit."""
    observer = SizeObserver()
    store = MemoryStore(MAX_BYTES, observer)
    for entries in puts:
        store.put(entries)
        assert observer.size == sum(ENTRY_BYTES + len(value) for value in store._entries.values())
        assert observer.size <= MAX_BYTES
