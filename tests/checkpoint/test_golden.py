"""Golden vectors: computation, storage, and comparison with the vectors of an engine."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import examples
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.golden import (
    MIN_COSINE,
    GoldenVectors,
    file_versions,
    fingerprint,
    golden_vectors,
)
from taskvec.checkpoint.reference import reference_vectors

ADAPTERS = ("retrieval", "text-matching", "clustering", "classification")
WEIGHTS = Path("adapters/clustering/adapter_model.safetensors")
every_name = pytest.mark.parametrize("name", [None, *ADAPTERS])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache folder."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def golden(default_checkpoint: Checkpoint, cache: Path) -> GoldenVectors:
    """Golden vectors of the default model."""
    return golden_vectors(default_checkpoint, cache)


@pytest.fixture(scope="module")
def distinct(golden: GoldenVectors) -> GoldenVectors:
    """Random golden vectors, which differ strongly between adapters."""
    random = np.random.default_rng(3)
    shape = golden.vectors[None].shape
    raw = {name: random.standard_normal(shape).astype(np.float32) for name in golden.vectors}
    unit = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in raw.items()}
    return replace(golden, vectors=unit)


@pytest.fixture
def checkpoint(default_checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    """The default model in a folder of which files may change."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(default_checkpoint.folder, folder)
    return read_checkpoint(folder, "copy")


def stored(cache: Path) -> Path:
    """Return the only file in a cache folder."""
    (file,) = [path for path in cache.rglob("*") if path.is_file()]
    return file


def same(one: GoldenVectors, two: GoldenVectors) -> bool:
    """Return whether probes, adapters and vectors are exactly equal."""
    return (
        one.adapters == two.adapters
        and list(map(bytes, one.probes)) == list(map(bytes, two.probes))
        and one.vectors.keys() == two.vectors.keys()
        and all(np.array_equal(one.vectors[name], two.vectors[name]) for name in one.vectors)
    )


def test_probes_are_valid_texts(golden: GoldenVectors, default_checkpoint: Checkpoint) -> None:
    """Probes are int32 ids of the vocabulary, with two lengths within the limit."""
    lengths = [len(probe) for probe in golden.probes]
    assert len(set(lengths)) == len(lengths) >= 2
    assert max(lengths) <= default_checkpoint.card.max_tokens
    for probe in golden.probes:
        assert probe.dtype == np.int32
        assert 0 <= probe.min() <= probe.max() < default_checkpoint.card.vocabulary


def test_vectors_equal_the_reference(golden: GoldenVectors, default_checkpoint: Checkpoint) -> None:
    """Each adapter and the bare backbone have normalised vectors for each probe."""
    assert golden.adapters == default_checkpoint.card.adapters
    assert set(golden.vectors) == {None, *ADAPTERS}
    for name, vectors in golden.vectors.items():
        assert vectors.dtype == np.float32
        truth = reference_vectors(default_checkpoint, golden.probes, [name] * len(golden.probes))
        truth /= np.linalg.norm(truth, axis=1, keepdims=True)
        assert np.abs(vectors - truth).max() <= 1e-6


def test_without_adapters_the_backbone_is_served(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A checkpoint without adapters has the vectors of the bare backbone only."""
    shutil.rmtree(checkpoint.folder / "adapters")
    config = checkpoint.folder / "config.json"
    stated = json.loads(config.read_text())
    config.write_text(json.dumps({key: stated[key] for key in stated if key != "task_names"}))
    bare = golden_vectors(read_checkpoint(checkpoint.folder, "bare"), tmp_path / "cache")
    assert bare.adapters == (None,)
    assert set(bare.vectors) == {None}
    assert bare.mismatch(None, bare.vectors[None]) is None


def test_stored_vectors_are_used(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A second call reads the stored file: a marked vector is returned."""
    first = golden_vectors(default_checkpoint, tmp_path)
    file = stored(tmp_path)
    with np.load(file) as arrays:
        kept = dict(arrays)
    kept["clustering"] = -kept["clustering"]
    np.savez(file, **kept)
    second = golden_vectors(default_checkpoint, tmp_path)
    assert np.array_equal(second.vectors["clustering"], -first.vectors["clustering"])
    assert np.array_equal(second.vectors["retrieval"], first.vectors["retrieval"])


@pytest.mark.parametrize("kept", ["nothing", "half", "text", "array", "shape", "dtype", "names"])
def test_a_damaged_file_is_computed_again(
    default_checkpoint: Checkpoint, golden: GoldenVectors, tmp_path: Path, kept: str
) -> None:
    """A truncated or wrong file is replaced by a correct one."""
    assert same(golden_vectors(default_checkpoint, tmp_path), golden)
    file = stored(tmp_path)
    whole = file.read_bytes()
    arrays = {name or "": vectors for name, vectors in golden.vectors.items()}
    if kept == "shape":
        np.savez(file, **{name: rows[:, :-1] for name, rows in arrays.items()})
    elif kept == "dtype":
        np.savez(file, **{name: rows.astype(np.float64) for name, rows in arrays.items()})
    elif kept == "names":
        np.savez(file, **{name: rows for name, rows in arrays.items() if name != "clustering"})
    elif kept == "array":
        with file.open("wb") as stream:
            np.save(stream, golden.vectors[None])
    else:
        file.write_bytes({"nothing": b"", "half": whole[: len(whole) // 2], "text": b"hi"}[kept])
    assert same(golden_vectors(default_checkpoint, tmp_path), golden)
    with np.load(stored(tmp_path)) as repaired:
        assert {name: repaired[name].shape for name in repaired.files} == {
            name: rows.shape for name, rows in arrays.items()
        }


def test_damage_never_changes_vectors(
    default_checkpoint: Checkpoint, golden: GoldenVectors, tmp_path: Path
) -> None:
    """With any changed bytes in the file, the vectors are correct."""
    golden_vectors(default_checkpoint, tmp_path)
    file = stored(tmp_path)
    whole = file.read_bytes()
    # Most bytes are vectors; headers are at both ends and before each array.
    heads = [place for place in range(len(whole)) if whole[place : place + 2] == b"PK"]
    places = st.sampled_from([head + i for head in heads for i in range(140)]).filter(
        lambda place: place < len(whole)
    ) | st.integers(0, len(whole) - 1)

    @given(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=3))
    @example([(heads[-2] + 8, 1)])  # the flag of an encrypted array
    @settings(max_examples=examples(150), suppress_health_check=[HealthCheck.too_slow])
    def check(changes: list[tuple[int, int]]) -> None:
        damaged = bytearray(whole)
        for place, value in changes:
            damaged[place] = value
        file.write_bytes(damaged)
        assert same(golden_vectors(default_checkpoint, tmp_path), golden)

    check()


def test_an_unwritable_cache_is_ignored(
    default_checkpoint: Checkpoint, golden: GoldenVectors, tmp_path: Path
) -> None:
    """If the cache folder cannot be created, the vectors are computed without an error."""
    (tmp_path / "file").write_text("no folder")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert same(golden_vectors(default_checkpoint, place), golden)
    assert (tmp_path / "file").read_text() == "no folder"


def test_no_temporary_files_remain(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """After a call, the cache contains only the complete file."""
    golden_vectors(default_checkpoint, tmp_path / "a" / "b")
    assert stored(tmp_path).name.startswith(fingerprint(default_checkpoint))
    assert "part" not in stored(tmp_path).name


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "config_sentence_transformers.json",
        "adapters/clustering/adapter_model.safetensors",
        "adapters/clustering/adapter_config.json",
    ],
)
def test_a_replaced_file_has_another_version(
    default_checkpoint: Checkpoint, tmp_path: Path, name: str
) -> None:
    """A file of the same size and date that has taken the place of another is seen, and named."""
    folder = Path(shutil.copytree(default_checkpoint.folder, tmp_path / "checkpoint"))
    before = file_versions(read_checkpoint(folder, "a name"))
    assert file_versions(read_checkpoint(folder, "another name")) == before
    copy = tmp_path / "copy"
    shutil.copy2(folder / name, copy)
    copy.replace(folder / name)
    after = file_versions(read_checkpoint(folder, "a name"))
    assert {file for file in before if before[file] != after[file]} == {name}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", str(WEIGHTS)])
def test_a_changed_file_changes_the_fingerprint(checkpoint: Checkpoint, name: str) -> None:
    """A changed date or size of a config or weight file changes the fingerprint."""
    before = fingerprint(checkpoint)
    assert fingerprint(read_checkpoint(checkpoint.folder, "another name")) == before
    file = checkpoint.folder / name
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    dated = fingerprint(checkpoint)
    with file.open("ab") as stream:
        stream.write(b" ")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    longer = fingerprint(checkpoint)
    assert len({before, dated, longer}) == 3


def test_a_changed_adapter_gets_new_vectors(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """After the weights have changed, the old vectors are not used."""
    old = golden_vectors(checkpoint, tmp_path / "cache")
    shutil.copy(
        checkpoint.folder / "adapters/retrieval" / WEIGHTS.name, checkpoint.folder / WEIGHTS
    )
    new = golden_vectors(read_checkpoint(checkpoint.folder, "copy"), tmp_path / "cache")
    assert np.array_equal(new.vectors["retrieval"], old.vectors["retrieval"])
    assert np.allclose(new.vectors["clustering"], old.vectors["retrieval"], atol=1e-6)
    assert not np.allclose(new.vectors["clustering"], old.vectors["clustering"], atol=1e-2)


def test_another_text_limit_gets_new_vectors(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """If a lower limit truncates the probes, vectors of the longer probes are not used."""
    golden_vectors(default_checkpoint, tmp_path)
    short = replace(default_checkpoint, card=replace(default_checkpoint.card, max_tokens=8))
    golden = golden_vectors(short, tmp_path)
    assert max(map(len, golden.probes)) == 8
    truth = reference_vectors(short, golden.probes, [None] * len(golden.probes))
    assert golden.mismatch(None, truth) is None


@every_name
def test_right_vectors_pass(golden: GoldenVectors, name: str | None) -> None:
    """Correct vectors of any norm pass, as do vectors with bfloat16's precision."""
    right = golden.vectors[name]
    for scale in (1.0, 0.05, 300.0):
        assert golden.mismatch(name, (right * scale).astype(np.float32)) is None
    coarse = (right.view(np.uint32) & 0xFFFF0000).view(np.float32)
    assert not np.array_equal(coarse, right)
    assert golden.mismatch(name, coarse) is None
    for seed in range(20):
        assert golden.mismatch(name, noisy(right, 0.01, seed)) is None


def test_the_noise_of_eight_bit_weights_passes(distinct: GoldenVectors) -> None:
    """Noise passes until the cosine falls below the minimum."""
    right = distinct.vectors["retrieval"]
    assert distinct.mismatch("retrieval", noisy(right, 0.12)) is None
    mismatch = distinct.mismatch("retrieval", noisy(right, 0.2))
    assert mismatch is not None
    assert mismatch.startswith("adapter 'retrieval' gives wrong vectors: cosine 0.98")


@pytest.mark.parametrize("given_name", [None, *ADAPTERS])
@every_name
def test_the_vectors_of_another_adapter_are_named(
    golden: GoldenVectors, distinct: GoldenVectors, name: str | None, given_name: str | None
) -> None:
    """A swapped or missing adapter is reported with the adapter that the vectors belong to.

    Also where adapters lie as near to each other as the default model's.
    """
    for one in (golden, distinct):
        mismatch = one.mismatch(name, noisy(one.vectors[given_name] * 7, 0.01))
        if given_name == name:
            assert mismatch is None
        else:
            assert mismatch == f"{called(name)} gives the vectors of {called(given_name)}"


@pytest.mark.parametrize("near", [False, True])
def test_one_wrong_probe_is_enough(
    golden: GoldenVectors, distinct: GoldenVectors, near: bool
) -> None:
    """An engine that applies the right adapter to only one text of a batch is rejected."""
    one = golden if near else distinct
    for row in range(len(one.probes)):
        mixed = one.vectors["retrieval"].copy()
        mixed[row] = one.vectors["clustering"][row]
        mismatch = one.mismatch("retrieval", mixed)
        assert mismatch is not None
        assert mismatch.startswith("adapter 'retrieval' gives ")


def test_other_vectors_are_rejected_with_their_cosine(golden: GoldenVectors) -> None:
    """For vectors of another model, the message has the cosine and possible causes."""
    other = np.random.default_rng(1).standard_normal(golden.vectors[None].shape)
    mismatch = golden.mismatch("clustering", other.astype(np.float32))
    assert mismatch is not None
    assert mismatch.startswith("adapter 'clustering' gives wrong vectors: cosine ")
    assert str(MIN_COSINE) in mismatch
    mismatch = golden.mismatch(None, -golden.vectors[None])
    assert mismatch is not None
    assert mismatch.startswith("the bare backbone gives wrong vectors: cosine -1.000 ")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_rejected(golden: GoldenVectors, value: float) -> None:
    """A single NaN or infinity is reported."""
    damaged = golden.vectors["retrieval"].copy()
    damaged[-1, -1] = value
    mismatch = golden.mismatch("retrieval", damaged)
    assert mismatch == "adapter 'retrieval' gives vectors that are not finite"


def test_zeros_are_rejected(golden: GoldenVectors) -> None:
    """One vector of zeros among correct ones is reported."""
    empty = golden.vectors["retrieval"].copy()
    empty[-1] = 0
    assert golden.mismatch("retrieval", empty) == "adapter 'retrieval' gives vectors of zeros"


def test_a_wrong_shape_is_rejected(golden: GoldenVectors) -> None:
    """A wrong number or width of vectors is reported with the shape."""
    right = golden.vectors[None]
    texts, width = right.shape
    for wrong in (right[:1], right[:, : width // 2], np.tile(right, (2, 1)), right[0]):
        mismatch = golden.mismatch(None, wrong)
        shapes = f"{list(wrong.shape)}, not {[texts, width]}"
        assert mismatch == f"the bare backbone gives vectors of shape {shapes}"


def noisy(vectors: NDArray[np.float32], share: float, seed: int = 5) -> NDArray[np.float32]:
    """Return the vectors plus noise, relative to their norm."""
    noise = np.random.default_rng(seed).standard_normal(vectors.shape)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    noise *= share * lengths / np.linalg.norm(noise, axis=1, keepdims=True)
    return (vectors + noise).astype(np.float32)


def called(name: str | None) -> str:
    """Return the name of an adapter in messages."""
    return "the bare backbone" if name is None else f"adapter '{name}'"
