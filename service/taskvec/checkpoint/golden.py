"""Golden vectors: what each adapter of a checkpoint must give for a few probe texts.

Computed once by the numpy reference, kept in the cache folder, and used to refuse any engine or
server that would serve other vectors: a missing or swapped adapter, wrong weights, wrong pooling.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.reference import reference_vectors

PROBES = (
    "Query: how do I stop a program that is still running?",
    "Document: a glacier is a mass of ice that moves slowly down a valley and carries stones.",
)
"""Real text, on which a trained model's adapters differ far more than on random tokens; of two
lengths, so that a batch of them is a mixed one."""

MATCH = 0.99
"""Least cosine to the golden vector: bfloat16 stays above 0.999, 8-bit weights about 0.99."""

_FORMAT = b"2"
"""Of what is kept in the cache folder, the plain copy too."""

_BASE = ""
"""How the bare backbone is called in the file; no adapter can have that name."""


@dataclass(frozen=True, slots=True)
class GoldenVectors:
    """What to ask, and what must come back.

    Attributes:
        probes: token ids of each probe.
        vectors: adapter (None: the bare backbone) -> float32 [probes, dimension], length 1 each.
        adapters: those that an engine must serve; ``(None,)`` where the checkpoint has none.
    """

    probes: tuple[NDArray[np.int32], ...]
    vectors: Mapping[str | None, NDArray[np.float32]]
    adapters: tuple[str | None, ...]

    def fault(self, adapter: str | None, given: NDArray[np.float32]) -> str | None:
        """What is wrong with an engine's answer to the probes; None if nothing is.

        Args:
            adapter: the one that was asked for.
            given: float32 [probes, dimension], of any length.
        """
        wanted = self.vectors[adapter]
        asked = named(adapter)
        if given.shape != wanted.shape:
            return f"{asked} gives vectors of shape {list(given.shape)}, not {list(wanted.shape)}"
        if not np.isfinite(given).all():
            return f"{asked} gives vectors that are not finite"
        lengths = np.linalg.norm(given.astype(np.float64), axis=1, keepdims=True)
        if not lengths.all():
            return f"{asked} gives vectors of zeros"
        names = list(self.vectors)
        unit = given / lengths
        cosines = np.stack([(golden * unit).sum(axis=1) for golden in self.vectors.values()])
        for probe, nearest in enumerate(cosines.argmax(axis=0)):
            if names[nearest] != adapter and cosines[nearest, probe] >= MATCH:
                return f"{asked} gives the vectors of {named(names[nearest])}"
        right = cosines[names.index(adapter)]
        if right.min() < MATCH:
            return (
                f"{asked} gives wrong vectors: cosine {right.min():.3f} to the right ones, at "
                f"least {MATCH} is asked; other weights, another model, or too coarse a number type"
            )
        return None


def named(adapter: str | None) -> str:
    """How messages call an adapter."""
    return "the bare backbone" if adapter is None else f"adapter {adapter!r}"


def golden_vectors(checkpoint: Checkpoint, cache: Path) -> GoldenVectors:
    """The golden vectors of a checkpoint, from the cache or computed.

    Args:
        checkpoint: whose.
        cache: folder to keep them in; one that cannot be written is no error.
    """
    probes = _probes(checkpoint)
    names: list[str | None] = [None, *checkpoint.card.adapters]
    asked = zlib.crc32(b" ".join(probe.tobytes() for probe in probes))
    file = cache / "golden" / f"{fingerprint(checkpoint)}-{asked:08x}.npz"
    vectors = _stored(file, names, (len(probes), checkpoint.backbone.hidden))
    if vectors is None:
        rows = reference_vectors(
            checkpoint,
            [probe for _ in names for probe in probes],
            [name for name in names for _ in probes],
        )
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        parts = np.split(unit.astype(np.float32), len(names))
        vectors = dict(zip(names, parts, strict=True))
        _store(file, vectors)
    return GoldenVectors(probes, vectors, checkpoint.card.adapters or (None,))


def fingerprint(checkpoint: Checkpoint) -> str:
    """Names one state of a checkpoint's files; changes when a config or weight file does."""
    digest = hashlib.sha256(_FORMAT)
    for file in _files(checkpoint):
        state = file.stat()
        digest.update(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    for adapter in checkpoint.adapters:
        digest.update(f"{adapter.name} {adapter.scale}\n".encode())
    return digest.hexdigest()[:32]


def content_digest(checkpoint: Checkpoint) -> str:
    """Names what a checkpoint's files hold, wherever they lie; reads all of them."""
    digest = hashlib.sha256(_FORMAT)
    for path in _files(checkpoint):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for adapter in checkpoint.adapters:
        digest.update(f"{adapter.name} {adapter.scale}\n".encode())
    return digest.hexdigest()


def _files(checkpoint: Checkpoint) -> list[Path]:
    """What a vector depends on: the config, the weights, the adapters."""
    weights = sorted({file for file, _ in checkpoint.weights.values()})
    adapters = [adapter.weights for adapter in checkpoint.adapters]
    return [checkpoint.folder / "config.json", *weights, *adapters]


def _probes(checkpoint: Checkpoint) -> tuple[NDArray[np.int32], ...]:
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    most, last = checkpoint.card.max_tokens, checkpoint.backbone.vocabulary - 1
    ids = (np.array(tokenizer.encode(text).ids[:most], dtype=np.int32) for text in PROBES)
    return tuple(np.minimum(text, last) for text in ids)


def _stored(
    file: Path, names: Sequence[str | None], shape: tuple[int, int]
) -> dict[str | None, NDArray[np.float32]] | None:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            vectors = {name: arrays[name or _BASE] for name in names}
    except Exception:  # noqa: BLE001 - a damaged file fails in many ways
        return None  # not there, or a write that was cut short: computed again
    fits = all(v.shape == shape and v.dtype == np.float32 for v in vectors.values())
    return vectors if fits else None


def _store(file: Path, vectors: Mapping[str | None, NDArray[np.float32]]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = file.with_suffix(".part.npz")
        arrays: dict[str, Any] = {name or _BASE: rows for name, rows in vectors.items()}
        np.savez(whole, **arrays)
        whole.replace(file)
    except OSError:
        return  # a read-only cache costs seconds at the next start, nothing else
