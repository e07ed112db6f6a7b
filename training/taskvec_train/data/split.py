"""Hold out entities by a hash of their names, so that every part of the corpus agrees."""

from __future__ import annotations

import hashlib

HELD_OUT_SHARE = 0.08


def is_held_out(source: str, entity: str) -> bool:
    """Return whether an entity is held out: no stage may see its texts."""
    return unit_hash(f"{source}/{entity}") < HELD_OUT_SHARE


def unit_hash(name: str) -> float:
    """Return a hash of a name as a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
