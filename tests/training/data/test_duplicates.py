"""Near-duplicates."""

from __future__ import annotations

import random

from taskvec_train.data.duplicates import Index, fingerprint, likeness, repeats

LONG = (
    "The command writes the contents of a table to a file on the server, one row a line, and "
    "needs the rights of a superuser, because it runs as the user who owns the database."
)


def test_case_punctuation_and_numbers_do_not_make_a_text_new():
    """Texts that differ in case, punctuation and numbers alone are the same."""
    assert Index().add(["Version 1.2 is out, now!", "version 3.4 is out now"]) == [None, 0]


def test_a_changed_word_in_a_long_text_is_a_near_duplicate():
    """One word changed at the end of a long text leaves it the same; another text is not."""
    index = Index()
    assert index.add([LONG]) == [None]
    assert index.add([LONG.replace("database.", "cluster."), "A different text."]) == [0, None]


def test_short_texts_repeat_only_themselves():
    """Texts of up to three words are the same only if all their words are."""
    assert Index().add(["create table", "create index", "Create Table"]) == [None, None, 0]


def test_likeness_is_the_jaccard_similarity_of_shingles():
    """Two of four shingles shared of six in all are a third."""
    one = fingerprint("a b c d e f")
    other = fingerprint("a b c d y z")
    assert likeness(one, other) == 2 / 6
    assert repeats(LONG, [one, fingerprint(LONG)])
    assert not repeats(LONG, [one, other])


def test_near_duplicates_are_found_among_many():
    """Of 300 texts with one word of 60 changed, nearly all are found; no other text is."""
    order = random.Random(3)
    words = [f"w{chr(97 + one)}{chr(97 + two)}" for one in range(26) for two in range(26)]
    texts = [" ".join(order.choices(words, k=60)) for _ in range(300)]
    changed = [text.replace(text.split()[30], "changed") for text in texts]
    index = Index()
    assert index.add(texts) == [None] * 300
    found = index.add(changed)
    assert index.size == 600
    assert all(earlier in (None, number) for number, earlier in enumerate(found))
    assert sum(earlier is not None for earlier in found) >= 290
