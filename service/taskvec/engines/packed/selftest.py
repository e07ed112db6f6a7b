"""The self-test that every start runs: an adapter that is asked for is applied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from taskvec.engines.packed.transformer import Transformer
from taskvec.errors import CheckpointError

PROBE_TOKENS = 24
ALIKE = 0.99
"""Least cosine between a vector computed in a mixed batch and the same one computed alone."""


def prove_adapters(transformer: Transformer, adapters: Sequence[str]) -> None:
    """Prove that every adapter changes the vector, each in its own way, alone and in a mixed batch.

    The same probe runs once per adapter in batches of one shape, so that equal weights would give
    bitwise equal vectors: numerical noise cannot pass for an adapter.

    Raises:
        CheckpointError: an adapter has no effect, two are the same, vectors are not finite, or a
            mixed batch gives other vectors than the adapters alone.
    """
    ids = np.random.default_rng(0).integers(
        0, transformer.backbone.vocabulary, PROBE_TOKENS, dtype=np.int32
    )
    names: list[str | None] = [None, *adapters]
    alone = {name: _normalised(transformer.embed([ids], [name]))[0] for name in names}
    for name, vector in alone.items():
        if not np.isfinite(vector).all():
            raise CheckpointError(
                f"The {_called(name)} gives vectors that are not finite in {transformer.dtype}: "
                "try --dtype float32, or the weights are damaged."
            )
    for i, name in enumerate(names):
        for other in names[:i]:
            if np.array_equal(alone[name], alone[other]):
                raise CheckpointError(
                    f"The {_called(name)} gives the same vectors as the {_called(other)}: it is "
                    f"empty, a copy, or lost in {transformer.dtype}."
                )
    mixed = _normalised(transformer.embed([ids] * len(names), names))
    for name, vector in zip(names, mixed, strict=True):
        if float(vector @ alone[name]) < ALIKE:
            raise CheckpointError(
                f"The {_called(name)} gives another vector in a mixed batch than alone on "
                f"{transformer.device}: please report this; --dtype float32 may help."
            )


def _called(name: str | None) -> str:
    return "backbone" if name is None else f"adapter {name!r}"


def _normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
