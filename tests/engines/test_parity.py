"""The packed engine computes the same vectors as transformers and peft, for any batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from oracle import Oracle
from synthetic import ADAPTERS, TINY_NANO, TINY_SMALL, write_checkpoint
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.engines.base import TokenIds
from taskvec.engines.packed.gpu import GpuTransformer
from taskvec.engines.packed.transformer import Transformer
from taskvec.engines.packed.weights import load_transformer

LENGTHS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 60, 64, 65, 100, 128, 129, 200, 256, 319, 320]
LONG = [321, 500, 1024, 2048]
FP32_DIFFERENCE = 1e-5
BF16_COSINE = 0.9995


@dataclass(frozen=True)
class Case:
    """A checkpoint, a mixed batch for it, and the oracle's vector of each text."""

    checkpoint: Checkpoint
    ids: list[TokenIds]
    adapters: list[str | None]
    truth: NDArray[np.float32]


def mixed_batch(
    checkpoint: Checkpoint, lengths: Sequence[int]
) -> tuple[list[TokenIds], list[str | None]]:
    """Return texts of these lengths, with every adapter and the bare backbone."""
    random = np.random.default_rng(7)
    vocabulary = checkpoint.backbone.vocabulary
    ids = [random.integers(0, vocabulary, length, dtype=np.int32) for length in lengths]
    tasks: list[str | None] = [None, *checkpoint.card.adapters]
    adapters = [tasks[i % len(tasks)] for i in range(len(ids))]
    shuffled = random.permutation(len(ids))
    return [ids[i] for i in shuffled], [adapters[i] for i in shuffled]


@pytest.fixture(scope="module", params=["small", "nano", "qwen3", "default"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Each architecture with random weights, and the default model."""
    room = tmp_path_factory.mktemp(request.param)
    if request.param == "default":
        checkpoint = open_checkpoint(DEFAULT_MODEL)
    else:
        shape = TINY_NANO if request.param == "nano" else TINY_SMALL
        jina = request.param != "qwen3"
        folder = write_checkpoint(room / "checkpoint", shape, jina=jina, seed=3)
        checkpoint = read_checkpoint(folder, request.param)
    oracle = Oracle(
        checkpoint.folder, checkpoint.backbone.architecture, checkpoint.card.adapters, room
    )
    ids, adapters = mixed_batch(checkpoint, LENGTHS * 3 + LONG)
    truth = np.stack(
        [oracle.embed(text, adapter) for text, adapter in zip(ids, adapters, strict=True)]
    )
    return Case(checkpoint, ids, adapters, truth)


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "low-rank"])
def test_float32_equals_the_oracle(case: Case, merge: bool) -> None:
    """In float32, every component of every vector differs from the oracle by at most 1e-5."""
    vectors = embed(load(case, torch.float32, merge=merge), case)
    assert np.abs(vectors - case.truth).max() <= FP32_DIFFERENCE


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "low-rank"])
def test_bfloat16_is_close_to_the_oracle(case: Case, merge: bool) -> None:
    """In bfloat16, every vector has a cosine of at least 0.9995 to the oracle's vector."""
    vectors = embed(load(case, torch.bfloat16, merge=merge), case)
    assert (vectors * case.truth).sum(axis=1).min() >= BF16_COSINE


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "low-rank"])
def test_the_forward_pass_for_gpus_equals_the_oracle(case: Case, merge: bool) -> None:
    """The forward pass for GPUs, run on the CPU with plain torch, keeps the same bounds."""
    vectors = embed(for_gpus(load(case, torch.float32, merge=merge)), case)
    assert np.abs(vectors - case.truth).max() <= FP32_DIFFERENCE
    vectors = embed(for_gpus(load(case, torch.bfloat16, merge=merge)), case)
    assert (vectors * case.truth).sum(axis=1).min() >= BF16_COSINE


def test_blocks_do_not_change_vectors(case: Case) -> None:
    """Many small blocks give the same vectors."""
    transformer = load(case, torch.float32, merge=False)
    whole = embed(transformer, case)
    transformer.block_rows = 48
    assert np.abs(embed(transformer, case) - whole).max() <= FP32_DIFFERENCE


def test_adapters_differ_from_each_other(case: Case) -> None:
    """The oracle's vectors of one text differ by adapter, so that parity tests the adapters."""
    transformer = load(case, torch.float32, merge=True)
    names: list[str | None] = [None, *case.checkpoint.card.adapters]
    vectors = transformer.embed([case.ids[0]] * len(names), names)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (unit @ unit.T)[~np.eye(len(names), dtype=bool)]
    assert cosines.max() < 0.99999


def test_all_four_adapters_are_in_the_batch(case: Case) -> None:
    """The mixed batch of the other tests contains every adapter and the bare backbone."""
    assert set(case.adapters) == {None, *ADAPTERS}


def load(case: Case, dtype: torch.dtype, *, merge: bool) -> Transformer:
    """Load the checkpoint on the CPU."""
    return load_transformer(case.checkpoint, device=torch.device("cpu"), dtype=dtype, merge=merge)


def for_gpus(transformer: Transformer) -> GpuTransformer:
    """Return the forward pass for GPUs with the same weights, on the CPU."""
    return GpuTransformer(
        transformer.backbone,
        transformer._embedding,
        transformer.layers,
        transformer._final_norm,
    )


def embed(transformer: Transformer | GpuTransformer, case: Case) -> NDArray[np.float32]:
    """Return the normalised vectors of the batch, computed in one forward."""
    vectors = transformer.embed(case.ids, case.adapters)
    unit: NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
