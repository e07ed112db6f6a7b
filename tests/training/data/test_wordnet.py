"""The parser of WordNet's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskvec_train.data.entries import Entry
from taskvec_train.data.records import Scored
from taskvec_train.data.wordnet import Taxonomy, graded_pairs, parse_wordnet, read_synsets

NOUNS = """\
  1 The licence comes first, on lines that start with two spaces.
00000001 03 n 01 entity 0 000 | that which is
00000002 05 n 02 animal 0 living_creature 0 001 @ 00000001 n 0000 \
| a living thing that moves; "animals need air"; "an animal in the zoo"
00000003 05 n 01 dog 0 002 @ 00000002 n 0000 ~ 00000004 n 0000 | a tame animal that barks
00000004 05 n 01 puppy 0 001 @ 00000003 n 0000 | a young dog: small
00000005 05 n 01 cat 0 001 @ 00000002 n 0000 | a tame animal that purrs
"""
VERBS = """\
00000006 30 v 01 change 0 000 01 + 08 00 | become different; "the weather changed"
"""
ADJECTIVES = """\
00000007 00 s 01 afraid(p) 0 001 & 00000008 a 0000 | filled with fear
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    below = tmp_path / "usr/share/wordnet"
    below.mkdir(parents=True)
    for part, lines in {"noun": NOUNS, "verb": VERBS, "adj": ADJECTIVES, "adv": ""}.items():
        (below / f"data.{part}").write_text(lines)
    return tmp_path


def test_a_line_is_read_into_a_synset(folder: Path):
    """Lemmas, gloss, examples, class and hypernym come from one line; markers are removed."""
    synsets = read_synsets(folder)
    animal = synsets["n00000002"]
    assert animal.lemmas == ("animal", "living creature")
    assert animal.gloss == "a living thing that moves"
    assert animal.examples == ("animals need air", "an animal in the zoo")
    assert animal.lexname == "animal"
    assert animal.hypernym == "n00000001"
    assert synsets["a00000007"].lemmas == ("afraid",)
    assert synsets["n00000001"].hypernym == ""


def test_lemmas_are_queries_for_the_gloss(folder: Path):
    """Each lemma is one query; examples are texts of the same entity; the label is the lexname."""
    entries = list(parse_wordnet([folder]))
    gloss, *rest = [entry for entry in entries if entry.entity == "n00000002"]
    assert gloss.text == "a living thing that moves"
    assert gloss.label == "animal"
    assert "animal" in gloss.anchors[0]
    assert "living creature" in gloss.anchors[1]
    assert len(gloss.anchors) == 2
    assert rest == [
        Entry("n00000002", "animals need air"),
        Entry("n00000002", "an animal in the zoo"),
        Entry("n00000002", "animal, living creature: a kind of entity", label="animal"),
    ]


def test_wu_palmer_counts_shared_ancestors(folder: Path):
    """It is twice the depth of the lowest common ancestor over the sum of both depths."""
    taxonomy = Taxonomy(read_synsets(folder))
    assert taxonomy.wu_palmer("n00000003", "n00000005") == 2 * 1 / (2 + 2)
    assert taxonomy.wu_palmer("n00000004", "n00000003") == 2 * 2 / (3 + 2)
    assert taxonomy.wu_palmer("n00000004", "n00000001") == 0
    assert taxonomy.wu_palmer("n00000001", "v00000006") == 0
    assert taxonomy.wu_palmer("n00000004", "n00000004") == 1


def test_graded_pairs_have_only_the_given_synsets(folder: Path):
    """Pairs have only texts of the given synsets, and are deterministic."""
    synsets = read_synsets(folder)
    keys = ["n00000002", "n00000003", "n00000005", "v00000006"]
    pairs = list(graded_pairs(synsets, keys, seed=1))
    assert pairs == list(graded_pairs(synsets, keys, seed=1))
    assert Scored("animal", "living creature", 1.0) in pairs
    assert Scored("become different", "the weather changed", 1.0) in pairs
    texts = {text for pair in pairs for text in (pair.a, pair.b)}
    assert not texts & {"a young dog: small", "puppy", "that which is", "entity"}
    assert all(0 <= pair.score <= 1 for pair in pairs)
