"""Which entities are held out: decided by a hash of their name, the same one everywhere."""

from __future__ import annotations

import hashlib

HELD_OUT_SHARE = 0.08


def is_held_out(source: str, entity: str) -> bool:
    """Whether no stage may see any text of this entity."""
    return unit_hash(f"{source}/{entity}") < HELD_OUT_SHARE


def unit_hash(name: str) -> float:
    """Return a number from 0 up to 1 that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
