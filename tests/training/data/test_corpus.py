"""The corpus, from sources to files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from rich.progress import Progress

from taskvec_train.data import (
    read_labelled,
    read_pairs,
    read_scored,
    read_texts,
)
from taskvec_train.data.cleaning import SourceEntries, clean, deduplicate
from taskvec_train.data.corpus import parse, write
from taskvec_train.data.entries import MAX_WORDS, Entry
from taskvec_train.data.packages import Package
from taskvec_train.data.sources import Source
from taskvec_train.data.split import HELD_OUT_SHARE, is_held_out
from taskvec_train.data.wordnet import Synset
from taskvec_train.errors import TrainingError
from taskvec_train.files import atomic_folder, write_jsonl

ANIMALS = ("cat", "dog", "horse", "cow", "sheep", "goat", "pig", "hen", "duck", "goose")
VERBS = ("eats", "hunts", "sees", "hears", "follows", "likes", "fears", "finds", "hides")
PLACES = ("forest", "river", "field", "house", "barn")


def animal_entries(_folders: Sequence[Path], name: str) -> Iterator[Entry]:
    for animal in ANIMALS:
        for verb in VERBS:
            for place in PLACES:
                yield Entry(
                    f"{animal} {verb} {place}",
                    f"In the {name} {place}, every {animal} {verb} what an old {animal} left there",
                    (f"what {verb} the {animal} near the {place} of {name}",),
                    "indoors" if place in {"house", "barn"} else "outdoors",
                )
        for verb in VERBS:
            told = (f"the {animal} of {name} {verb} the {other}" for other in ANIMALS)
            yield Entry(f"story of {animal}", ", ".join(told))
    for number in range(100):  # held out here are some lemmas that are graded in training
        lemma = spelled(number)
        text = f"{lemma} {name} tells in a word or two what {lemma} is"
        yield Entry(f"about {lemma}", text, (lemma,) if name == "northern" else ())


def spelled(number: int) -> str:
    """Return a number as letters, since digits are ignored when texts are compared."""
    return "lemma " + "".join(chr(97 + int(digit)) for digit in str(number))


def source(name: str) -> Source:
    parse = partial(animal_entries, name=name)
    return Source(name, "animals", (f"debian:{name}",), "MIT", "Nobody", parse)


SOURCES = [source("northern"), source("southern")]
PACKAGES = {
    f"debian:{name}": Package(name, "1.0", "0" * 64, Path("/nowhere"))
    for name in ("northern", "southern")
}
SYNSETS = {
    f"n{number:08}": Synset(
        f"n{number:08}",
        (spelled(number), f"synonym {number}"),
        f"the gloss of number {number}",
        (),
        "animal",
        f"n{number // 3:08}" if number else "",
    )
    for number in range(300)
}


def built(folder: Path) -> Path:
    folder.mkdir()
    with Progress(disable=True) as progress:
        parts = deduplicate(parse(SOURCES, PACKAGES, 1, progress))
        write(folder, parts, SYNSETS, PACKAGES, progress)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("corpus") / "a")


def held_out_texts(corpus: Path) -> set[str]:
    held = corpus / "heldout"
    found = set(read_texts(held / "texts.jsonl"))
    for file in ("corpus", "queries"):
        lines = (held / f"retrieval/animals/{file}.jsonl").read_text().splitlines()
        found |= {json.loads(line)["text"] for line in lines}
    for side in ("train", "test"):
        found |= {one.text for one in read_labelled(held / f"labelled/animals/{side}.jsonl")}
    graded = read_scored(held / "sts/wordnet.jsonl")
    return found | {text for pair in graded for text in (pair.a, pair.b)}


def test_no_stage_sees_a_held_out_text(corpus: Path):
    """Training texts, pairs, scored pairs and labelled texts contain no held-out text."""
    pairs = read_pairs(corpus / "pairs")
    graded = read_scored(corpus / "scored")
    seen = {
        *read_texts(corpus / "texts"),
        *read_texts(corpus / "long"),
        *(text for pair in pairs for text in (pair.anchor, pair.positive)),
        *(text for pair in graded for text in (pair.a, pair.b)),
        *(one.text for one in read_labelled(corpus / "labelled")),
    }
    held = held_out_texts(corpus)
    assert len(held) > 50
    assert not {text.lower() for text in seen} & {text.lower() for text in held}


def test_no_long_text_has_a_held_out_text_in_it(corpus: Path):
    """Long texts are joined from training passages, up to the length that a model reads."""
    long = read_texts(corpus / "long")
    assert all(150 <= len(text.split()) <= MAX_WORDS for text in long)
    held = held_out_texts(corpus)
    assert not any(text in one for one in long for text in held)


def test_the_same_sources_give_the_same_bytes(corpus: Path, tmp_path: Path):
    """All files of two builds are equal, including the card with its hashes."""
    again = built(tmp_path / "b")
    files = sorted(path.relative_to(corpus) for path in corpus.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for file in files:
        assert (corpus / file).read_bytes() == (again / file).read_bytes()


def test_every_query_has_an_answer_in_its_corpus(corpus: Path):
    """The retrieval sets have BEIR's layout, and their qrels refer to existing ids."""
    for folder in (corpus / "heldout/retrieval").iterdir():
        ids = [
            {json.loads(line)["_id"] for line in (folder / name).read_text().splitlines()}
            for name in ("queries.jsonl", "corpus.jsonl")
        ]
        head, *rows = (folder / "qrels/test.tsv").read_text().splitlines()
        assert head == "query-id\tcorpus-id\tscore"
        assert {row.split("\t")[0] for row in rows} == ids[0]
        assert {row.split("\t")[1] for row in rows} <= ids[1]
        assert {row.split("\t")[2] for row in rows} == {"1"}


def test_the_card_counts_and_names_everything(corpus: Path):
    """The card lists sources with licences, versions and counts, and files with hashes."""
    card = json.loads((corpus / "card.json").read_text())
    assert [row["licence"] for row in card["sources"]] == ["MIT", "MIT"]
    texts = sum(row["passages"] + row["pairs"] for row in card["sources"])
    assert texts == len(read_texts(corpus / "texts"))
    assert card["files"]["pairs/northern.jsonl"]["lines"] == card["sources"][0]["pairs"]
    assert "| northern | MIT | Nobody | northern 1.0 |" in (corpus / "card.md").read_text()


def test_the_expected_share_is_held_out():
    """The share of held-out entities is close to the configured one."""
    held = sum(is_held_out("x", str(number)) for number in range(10_000))
    assert abs(held / 10_000 - HELD_OUT_SHARE) < 0.01


def test_a_text_of_two_sources_is_kept_once_and_never_held_out():
    """A near-duplicate is dropped from the later source, and always from the held-out data."""
    text = "A widget is a small part of a machine that is made in a factory from steel and wood."
    first = SourceEntries(SOURCES[0], train=[Entry("a", text)])
    second = SourceEntries(
        SOURCES[1],
        train=[Entry("b", text.replace("wood.", "wool."))],
        held_out=[
            Entry("c", text.upper()),
            Entry("d", "Something else that nobody has seen.", (text, "what is else")),
        ],
    )
    parts = deduplicate([first, second])
    assert [len(part.train) for part in parts] == [1, 0]
    assert parts[1].held_out == [
        Entry("d", "Something else that nobody has seen.", ("what is else",))
    ]


def test_a_query_for_many_passages_is_dropped():
    """An anchor of more than three passages is dropped, one of three is kept."""
    vague = [Entry(one, f"{one} is a letter of the alphabet", ("Examples",)) for one in "abcd"]
    clear = [Entry(one, f"{one} is a letter of the alphabet", ("Notes",)) for one in "xyz"]
    (part,) = deduplicate([SourceEntries(SOURCES[0], train=[*vague, *clear])])
    assert [entry.anchors for entry in part.train] == [()] * 4 + [("Notes",)] * 3


def test_passages_that_are_not_prose_are_dropped():
    """Numbers, other scripts, one or two words and huge passages are dropped."""
    texts = ["1 2 3 4 5 6 7 8", "текст на другом языке", "two words", "a b " * 400]
    good = Entry("x", "These  words\tare prose.", ("", "why  so"))
    kept = list(clean([*(Entry("x", text) for text in texts), good]))
    assert kept == [Entry("x", "These words are prose.", ("why so",))]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path):
    """A file is replaced only when the new one is complete."""
    file = tmp_path / "a.jsonl"
    write_jsonl(file, [{"text": "old"}])
    with pytest.raises(TypeError):
        write_jsonl(file, [{"text": "new"}, {"text": object()}])
    assert read_texts(file) == ["old"]
    assert list(tmp_path.iterdir()) == [file]


def build_halfway(out: Path):
    with atomic_folder(out) as folder:
        (folder / "half").write_text("written")
        (folder / "nowhere" / "half").write_text("not written")


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path):
    """A failed build leaves no folder, and an existing folder is not replaced."""
    out = tmp_path / "corpus"
    with pytest.raises(TrainingError):
        build_halfway(out)
    assert list(tmp_path.iterdir()) == []
    with atomic_folder(out) as folder:
        (folder / "whole").write_text("written")
    assert (out / "whole").exists()
    with pytest.raises(TrainingError, match="already exists"), atomic_folder(out):
        pass
