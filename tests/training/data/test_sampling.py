"""Samples of a corpus."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from taskvec_train.data.records import Labelled, Pair, Scored
from taskvec_train.data.sampling import sample
from taskvec_train.recipe import read_recipe
from taskvec_train.run import START, run_recipe
from tinytraining import TOPICS

LARGE = [f"large {n}" for n in range(8000)]
SMALL = [f"small {n}" for n in range(500)]
TINY = ["one", "two", "three"]


def test_a_sample_keeps_the_order_and_has_every_file() -> None:
    """Records stay in order, every file is sampled, and sizes count with the power 0.75."""
    taken = sample([LARGE, SMALL, TINY], 900)
    assert 897 <= len(taken) <= 900
    assert taken == [text for text in [*LARGE, *SMALL, *TINY] if text in set(taken)]
    large = sum(text.startswith("large") for text in taken)
    small = sum(text.startswith("small") for text in taken)
    assert abs(large / small - 8) < 0.1
    assert taken[-1] in TINY


def test_a_small_file_is_supplemented_by_the_others() -> None:
    """If a small file is exhausted, the other files supply the rest."""
    taken = sample([LARGE, SMALL, TINY], 6000)
    assert 5997 <= len(taken) <= 6000
    assert set(SMALL) | set(TINY) <= set(taken)


def test_a_larger_sample_than_the_corpus_is_the_corpus() -> None:
    """A sample larger than the corpus is the corpus, without repetition."""
    assert sample([SMALL, TINY], 10_000) == [*SMALL, *TINY]


def test_a_smaller_sample_is_a_subset_of_a_larger_one() -> None:
    """A smaller sample is a subset of a larger one, whatever the order of the files."""
    small, large = set(sample([LARGE, SMALL], 200)), set(sample([SMALL, LARGE], 2000))
    assert small < large


def test_records_of_one_text_are_taken_together() -> None:
    """Pairs are sampled by their positive, so that they match the sampled texts."""
    texts = set(sample([LARGE], 100))
    pairs = sample([[Pair(f"query {text}", text) for text in LARGE]], 100)
    labelled = sample([[Labelled(text, "label") for text in LARGE]], 100)
    scored = sample([[Scored(text, "other", 1.0) for text in LARGE]], 100)
    assert {pair.positive for pair in pairs} == texts
    assert {record.text for record in labelled} == texts
    assert {record.a for record in scored} == texts


def test_a_stage_uses_only_its_sample(recipe_file: Path, data: Path, tmp_path: Path) -> None:
    """The teacher embeds only the sample, but the vocabulary covers all texts."""
    changes = ["adapt=[]", "distill.words.steps=1", "distill.words.pairs=[]"]
    changes += ["distill.words.held_out=[]", "distill.words.sample=30"]
    run_recipe(read_recipe(recipe_file, changes), data, tmp_path / "run", cpu=True)
    (vectors,) = (tmp_path / "run" / "teacher").glob("*/part-0000/ids.npy")
    assert len(np.load(vectors)) <= 30
    tokenizer = Tokenizer.from_file(str(tmp_path / "run" / START / "tokenizer.json"))
    assert {word for words in TOPICS.values() for word in words} <= tokenizer.get_vocab().keys()
