"""Golden vectors: the expected vectors of each adapter for a few probe texts.

They are computed once by the numpy reference and stored in the cache folder. An engine or server
that returns other vectors is rejected: its adapter is missing or swapped, or its weights or pooling
are wrong.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.files import PROMPTS_FILE
from taskvec.checkpoint.reference import reference_vectors

PROBES = (
    "Query: how do I stop a program that is still running?",
    "Document: a glacier is a mass of ice that moves slowly down a valley and carries stones.",
)
"""Natural text, because the adapters of a trained model differ far more on it than on random
tokens. Two lengths, so that one batch has texts of different lengths."""

MIN_COSINE = 0.99
"""Smallest cosine to the golden vector: bfloat16 stays above 0.999, 8-bit weights near 0.99."""

_FORMAT = b"2"
"""Version of the files in the cache folder: the golden vectors and the copy for vLLM."""

DESCRIBING_FILES = (PROMPTS_FILE, "adapter_config.json", "tokenizer_config.json")
"""Files that a folder of weights may have, with what else vectors depend on."""

_BACKBONE_KEY = ""
"""Key of the bare backbone in the stored file; adapter names are never empty."""


@dataclass(frozen=True, slots=True)
class GoldenVectors:
    """Probe texts and the vectors that an engine must return for them.

    Attributes:
        probes: int32 token ids [length] of each probe.
        vectors: adapter (None: the bare backbone) -> float32 [probes, dimension], L2-normalised.
        adapters: adapters that an engine must serve; ``(None,)`` if the checkpoint has none.
    """

    probes: tuple[NDArray[np.int32], ...]
    vectors: Mapping[str | None, NDArray[np.float32]]
    adapters: tuple[str | None, ...]

    def mismatch(self, adapter: str | None, vectors: NDArray[np.float32]) -> str | None:
        """Compare the vectors of an engine with the golden vectors.

        Args:
            adapter: the adapter that the engine was to apply.
            vectors: float32 [probes, dimension], normalised or not.

        Returns:
            A description of the error, or None if the vectors match.
        """
        expected = self.vectors[adapter]
        label = adapter_label(adapter)
        if vectors.shape != expected.shape:
            shapes = f"{list(vectors.shape)}, not {list(expected.shape)}"
            return f"{label} gives vectors of shape {shapes}"
        if not np.isfinite(vectors).all():
            return f"{label} gives vectors that are not finite"
        norms = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        if not norms.all():
            return f"{label} gives vectors of zeros"
        names = list(self.vectors)
        unit = vectors / norms
        cosines = np.stack([(golden * unit).sum(axis=1) for golden in self.vectors.values()])
        for probe, nearest in enumerate(cosines.argmax(axis=0)):
            if names[nearest] != adapter and cosines[nearest, probe] >= MIN_COSINE:
                return f"{label} gives the vectors of {adapter_label(names[nearest])}"
        lowest = cosines[names.index(adapter)].min()
        if lowest < MIN_COSINE:
            return (
                f"{label} gives wrong vectors: cosine {lowest:.3f} to the expected vectors, at "
                f"least {MIN_COSINE} is required; the weights or the model differ, or the dtype is "
                "too coarse"
            )
        return None


def adapter_label(adapter: str | None) -> str:
    """Return the name of an adapter for use in messages."""
    return "the bare backbone" if adapter is None else f"adapter {adapter!r}"


def golden_vectors(checkpoint: Checkpoint, cache: Path) -> GoldenVectors:
    """Return the golden vectors of a checkpoint, from the cache if possible.

    Args:
        checkpoint: the checkpoint that will be served.
        cache: folder to store them in. Errors when writing to it are ignored.
    """
    probes = _probes(checkpoint)
    names: list[str | None] = [None, *checkpoint.card.adapters]
    probes_crc = zlib.crc32(b" ".join(probe.tobytes() for probe in probes))
    file = cache / "golden" / f"{fingerprint(checkpoint)}-{probes_crc:08x}.npz"
    vectors = _load(file, names, (len(probes), checkpoint.backbone.hidden))
    if vectors is None:
        rows = reference_vectors(
            checkpoint,
            [probe for _ in names for probe in probes],
            [name for name in names for _ in probes],
        )
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        per_adapter = np.split(unit.astype(np.float32), len(names))
        vectors = dict(zip(names, per_adapter, strict=True))
        _store(file, vectors)
    return GoldenVectors(probes, vectors, checkpoint.card.adapters or (None,))


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return an identifier of the checkpoint files, computed from paths, sizes and dates."""
    digest = hashlib.sha256(_FORMAT)
    for file in _files(checkpoint):
        state = file.stat()
        digest.update(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}\n".encode())
    for adapter in checkpoint.adapters:
        digest.update(f"{adapter.name} {adapter.scale}\n".encode())
    return digest.hexdigest()[:32]


def content_digest(checkpoint: Checkpoint) -> str:
    """Return a hash of the contents of the checkpoint files, independent of their paths.

    Reads all weights, which takes seconds for a large model.
    """
    digest = hashlib.sha256(_FORMAT)
    for path in _files(checkpoint):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for adapter in checkpoint.adapters:
        digest.update(f"{adapter.name} {adapter.scale}\n".encode())
    return digest.hexdigest()


def file_versions(checkpoint: Checkpoint) -> dict[str, tuple[int, int, int]]:
    """Return name -> (size, date in ns, inode) of each file that vectors depend on.

    Two processes for which they are equal have read the same checkpoint.
    """
    folder = checkpoint.folder
    folders = [folder, *(adapter.weights.parent for adapter in checkpoint.adapters)]
    described = [each / name for each in folders for name in DESCRIBING_FILES]
    versions = {}
    for file in (*_files(checkpoint), checkpoint.tokenizer, *described):
        with suppress(FileNotFoundError):  # some are optional
            state = file.stat()
            name = os.path.relpath(file, folder)
            versions[name] = (state.st_size, state.st_mtime_ns, state.st_ino)
    return versions


def _files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files that vectors depend on: config, weights and adapters."""
    weights = sorted({file for file, _ in checkpoint.weights.values()})
    adapters = [adapter.weights for adapter in checkpoint.adapters]
    return [checkpoint.folder / "config.json", *weights, *adapters]


def _probes(checkpoint: Checkpoint) -> tuple[NDArray[np.int32], ...]:
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    max_tokens, max_id = checkpoint.card.max_tokens, checkpoint.backbone.vocabulary - 1
    ids = (np.array(tokenizer.encode(text).ids[:max_tokens], dtype=np.int32) for text in PROBES)
    return tuple(np.minimum(text, max_id) for text in ids)


def _load(
    file: Path, names: Sequence[str | None], shape: tuple[int, int]
) -> dict[str | None, NDArray[np.float32]] | None:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            vectors = {name: arrays[name or _BACKBONE_KEY] for name in names}
    except Exception:  # noqa: BLE001 - a damaged file fails in many ways
        return None  # missing, or damaged by an interrupted write: computed again
    valid = all(v.shape == shape and v.dtype == np.float32 for v in vectors.values())
    return vectors if valid else None


def _store(file: Path, vectors: Mapping[str | None, NDArray[np.float32]]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".part.npz")
        arrays: dict[str, Any] = {name or _BACKBONE_KEY: rows for name, rows in vectors.items()}
        np.savez(temporary, **arrays)
        temporary.replace(file)
    except OSError:
        return  # with a read-only cache the vectors are computed again at the next start
