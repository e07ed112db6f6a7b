"""Parse WordNet's database files: glosses, examples, classes, and scored pairs.

The file format is wndb(5WN); the similarity is that of Wu and Palmer (1994).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from taskvec_train.data.entries import Entry, fill_template, normalise_text
from taskvec_train.data.records import Scored

_FILES = ("noun", "verb", "adj", "adv")
_LEXNAMES = (
    "adjective",
    "relational adjective",
    "adverb",
    "unique beginner",
    "act",
    "animal",
    "artifact",
    "attribute",
    "body",
    "cognition",
    "communication",
    "event",
    "feeling",
    "food",
    "group",
    "location",
    "motive",
    "object",
    "person",
    "phenomenon",
    "plant",
    "possession",
    "process",
    "quantity",
    "relation",
    "shape",
    "state",
    "substance",
    "time",
    "verb of body",
    "verb of change",
    "verb of cognition",
    "verb of communication",
    "verb of competition",
    "verb of consumption",
    "verb of contact",
    "verb of creation",
    "verb of emotion",
    "verb of motion",
    "verb of perception",
    "verb of possession",
    "verb of social life",
    "verb of state",
    "verb of weather",
    "participial adjective",
)
_UNCLASSED = {"adjective", "relational adjective", "adverb", "unique beginner"}
_NOUN_QUESTIONS = ("what is {lemma}", "define {lemma}", "{lemma}", "meaning of {lemma}")
_VERB_QUESTIONS = ("what does it mean to {lemma}", "to {lemma}", "{lemma}", "meaning of {lemma}")
_OTHER_QUESTIONS = ("what does {lemma} mean", "{lemma}", "meaning of {lemma}")


@dataclass(frozen=True, slots=True)
class Synset:
    """One sense: synonyms, gloss, examples, lexicographer class and first hypernym."""

    key: str
    lemmas: tuple[str, ...]
    gloss: str
    examples: tuple[str, ...]
    lexname: str
    hypernym: str


def read_synsets(folder: Path) -> dict[str, Synset]:
    """Read `data.noun`, `data.verb`, ... below `folder`; keys are like `n00001740`."""
    found = {}
    for part in _FILES:
        data = next(iter(folder.rglob(f"data.{part}")))
        for line in data.read_text("utf-8").splitlines():
            if not line.startswith(" "):
                synset = _synset(line)
                found[synset.key] = synset
    return found


def _synset(line: str) -> Synset:
    head, _, explained = line.partition(" | ")
    fields = head.split()
    offset, lexfile, kind, count = fields[:4]
    end = 4 + 2 * int(count, 16)
    lemmas = (re.sub(r"\((?:a|p|ip)\)$", "", lemma) for lemma in fields[4:end:2])
    pointers = fields[end + 1 :]
    hypernyms = (
        pointers[at + 2] + pointers[at + 1]
        for at in range(0, 4 * int(fields[end]), 4)
        if pointers[at] in {"@", "@i"}
    )
    examples = tuple(normalise_text(text) for text in re.findall(r'"([^"]+)"', explained))
    gloss = normalise_text(re.sub(r'[;:]?\s*"[^"]*"', "", explained)).strip(" ;")
    return Synset(
        key=("a" if kind == "s" else kind) + offset,
        lemmas=tuple(lemma.replace("_", " ") for lemma in lemmas),
        gloss=gloss,
        examples=examples,
        lexname=_LEXNAMES[int(lexfile)],
        hypernym=next(hypernyms, ""),
    )


def parse_wordnet(folders: Sequence[Path]) -> Iterator[Entry]:
    """Yield glosses with lemmas as queries, synonyms with their hypernym, and examples."""
    synsets = read_synsets(folders[0])
    for synset in synsets.values():
        questions = {"n": _NOUN_QUESTIONS, "v": _VERB_QUESTIONS}.get(
            synset.key[0], _OTHER_QUESTIONS
        )
        label = "" if synset.lexname in _UNCLASSED else synset.lexname
        anchors = tuple(fill_template(questions, lemma=lemma) for lemma in synset.lemmas)
        yield Entry(synset.key, synset.gloss, anchors, label)
        for example in synset.examples:
            yield Entry(synset.key, example)
        above = synsets.get(synset.hypernym)
        if above and len(synset.lemmas) > 1:
            described = f"{', '.join(synset.lemmas)}: a kind of {above.lemmas[0]}"
            yield Entry(synset.key, described, label=label)


class Taxonomy:
    """The tree of first hypernyms."""

    def __init__(self, synsets: dict[str, Synset]) -> None:
        self._synsets = synsets

    def path(self, key: str) -> list[str]:
        """Return the keys from a synset up to its root."""
        path = [key]
        while (above := self._synsets[path[-1]].hypernym) and above not in path:
            path.append(above)
        return path

    def wu_palmer(self, one: str, other: str) -> float:
        """Return 2 depth(lowest common ancestor) / (depth(one) + depth(other)).

        Depth is the number of steps from the root, so synsets that share only the root, or nothing,
        get 0.
        """
        if one == other:
            return 1.0
        path, others = self.path(one), self.path(other)
        shared = len(set(path) & set(others)) - 1
        depths = len(path) - 1 + len(others) - 1
        return 2 * max(0, shared) / depths if depths else 0.0


def graded_pairs(synsets: dict[str, Synset], keys: Sequence[str], seed: int) -> Iterator[Scored]:
    """Yield pairs of texts of the noun and verb synsets `keys`, scored by the taxonomy.

    Synonyms, and a gloss with its own example, get 1. Glosses or lemmas of two synsets get their
    Wu-Palmer similarity. The second synset is drawn, among `keys`, from those with a common
    hypernym one to three levels up, and from all.
    """
    order = random.Random(seed)
    taxonomy = Taxonomy(synsets)
    keys = [key for key in keys if key[0] in "nv"]
    below: dict[str, list[str]] = {}
    for key in keys:
        for above in taxonomy.path(key)[1:4]:
            below.setdefault(above, []).append(key)
    for key in keys:
        synset = synsets[key]
        if len(synset.lemmas) > 1 and _shared_words(*synset.lemmas[:2]) == 0:
            yield Scored(synset.lemmas[0], synset.lemmas[1], 1.0)
        if synset.examples:
            yield Scored(synset.gloss, synset.examples[0], 1.0)
        near = [below[above] for above in taxonomy.path(key)[1:4] if above in below]
        for level, relatives in enumerate([*near, keys]):
            other = synsets[order.choice(relatives)]
            if other.key[0] == key[0] and other.key != key:
                score = round(taxonomy.wu_palmer(key, other.key), 4)
                if level % 2 == order.randrange(2):
                    yield Scored(synset.gloss, other.gloss, score)
                else:
                    yield Scored(synset.lemmas[0], other.lemmas[0], score)


def _shared_words(one: str, other: str) -> int:
    return len(set(one.lower().split()) & set(other.lower().split()))
