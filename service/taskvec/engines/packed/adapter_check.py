"""Self-test of every start: check that each adapter is applied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from taskvec.engines.packed.weights import AnyTransformer
from taskvec.errors import CheckpointError

PROBE_TOKENS = 24
"""Length of the probe text in tokens."""

MIN_COSINE = 0.99
"""Smallest allowed cosine between a vector from a mixed batch and the same vector from a batch of
one text."""


def check_adapters(transformer: AnyTransformer, adapters: Sequence[str]) -> None:
    """Check that every adapter gives a different vector, alone and in a mixed batch.

    One probe is embedded once per adapter, in batches of the same shape. Equal weights would give
    bitwise equal vectors, so numerical noise is never mistaken for an effect of the adapter.

    Raises:
        CheckpointError: an adapter has no effect, two adapters are equal, vectors are not finite,
            or a mixed batch gives different vectors.
    """
    ids = np.random.default_rng(0).integers(
        0, transformer.backbone.vocabulary, PROBE_TOKENS, dtype=np.int32
    )
    names: list[str | None] = [None, *adapters]
    alone = {name: _normalised(transformer.embed([ids], [name]))[0] for name in names}
    for name, vector in alone.items():
        if not np.isfinite(vector).all():
            raise CheckpointError(
                f"The {_label(name)} gives vectors that are not finite in {transformer.dtype}: "
                "try --dtype float32; if that does not help, the weights are damaged."
            )
    for i, name in enumerate(names):
        for other in names[:i]:
            if np.array_equal(alone[name], alone[other]):
                raise CheckpointError(
                    f"The {_label(name)} gives the same vectors as the {_label(other)}: it is "
                    f"empty, a copy, or lost in {transformer.dtype}."
                )
    mixed = _normalised(transformer.embed([ids] * len(names), names))
    for name, vector in zip(names, mixed, strict=True):
        if float(vector @ alone[name]) < MIN_COSINE:
            raise CheckpointError(
                f"The {_label(name)} gives a different vector in a mixed batch than alone on "
                f"{transformer.device}: please report this; --dtype float32 may help."
            )


def _label(name: str | None) -> str:
    return "backbone" if name is None else f"adapter {name!r}"


def _normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
