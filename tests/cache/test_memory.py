"""The cache in memory: bounded, and what is used stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskvec.cache.memory import ENTRY_BYTES, MemoryStore

VALUE = bytes(100)
ROOM = 5 * (ENTRY_BYTES + len(VALUE))


class Held:
    """Keeps what a store says of its size."""

    size = 0

    def cache_asked(self, *, hits: int, misses: int, hit_tokens: int) -> None:
        raise AssertionError(f"a store knows no hits: {hits} {misses} {hit_tokens}")

    def cache_holds(self, size: int) -> None:
        self.size = size

    def cache_failed(self) -> None:
        raise AssertionError("memory does not fail")


@pytest.mark.anyio
async def test_what_was_not_used_makes_room() -> None:
    """Of six entries where five fit, the one that nobody asked for goes."""
    store = MemoryStore(ROOM, Held())
    for name in b"abcde":
        store.put({bytes([name]): VALUE})
    assert await store.get([b"a", b"x"]) == [VALUE, None]
    store.put({b"f": VALUE})
    assert await store.get([b"a", b"b", b"c", b"f"]) == [VALUE, None, VALUE, VALUE]


@pytest.mark.anyio
async def test_what_is_too_large_is_not_kept() -> None:
    """An entry over the whole bound leaves an empty cache, not an endless one."""
    held = Held()
    store = MemoryStore(ROOM, held)
    store.put({b"a": bytes(ROOM)})
    assert await store.get([b"a"]) == [None]
    assert held.size == 0


@given(
    puts=st.lists(
        st.dictionaries(st.binary(min_size=1, max_size=1), st.binary(max_size=900), max_size=9),
        max_size=30,
    )
)
def test_it_is_bounded(puts: list[dict[bytes, bytes]]) -> None:
    """Whatever is put in, the size is that of the entries and never over the bound."""
    held = Held()
    store = MemoryStore(ROOM, held)
    for entries in puts:
        store.put(entries)
        assert held.size == sum(ENTRY_BYTES + len(value) for value in store._entries.values())
        assert held.size <= ROOM
