"""Near-duplicate detection."""

from __future__ import annotations

import random

from taskvec_train.data.duplicates import (
    DuplicateIndex,
    fingerprint,
    is_near_duplicate,
    jaccard,
)

LONG = (
    "The command writes the contents of a table to a file on the server, one row a line, and "
    "needs the rights of a superuser, because it runs as the user who owns the database."
)


def test_case_punctuation_and_numbers_do_not_make_a_text_new():
    """Texts that differ only in case, punctuation and numbers are duplicates."""
    assert DuplicateIndex().add(["Version 1.2 is out, now!", "version 3.4 is out now"]) == [
        None,
        0,
    ]


def test_a_changed_word_in_a_long_text_is_a_near_duplicate():
    """A long text with one changed word is a near-duplicate; another text is not."""
    index = DuplicateIndex()
    assert index.add([LONG]) == [None]
    assert index.add([LONG.replace("database.", "cluster."), "A different text."]) == [0, None]


def test_short_texts_must_be_equal():
    """Texts of up to three words are duplicates only if all words are equal."""
    assert DuplicateIndex().add(["create table", "create index", "Create Table"]) == [
        None,
        None,
        0,
    ]


def test_jaccard_similarity_is_of_shingles():
    """Two shared shingles of six give a third."""
    one = fingerprint("a b c d e f")
    other = fingerprint("a b c d y z")
    assert jaccard(one, other) == 2 / 6
    assert is_near_duplicate(LONG, [one, fingerprint(LONG)])
    assert not is_near_duplicate(LONG, [one, other])


def test_near_duplicates_are_found_among_many():
    """Of 300 texts with one changed word of 60, nearly all are found, and no other text."""
    order = random.Random(3)
    words = [f"w{chr(97 + one)}{chr(97 + two)}" for one in range(26) for two in range(26)]
    texts = [" ".join(order.choices(words, k=60)) for _ in range(300)]
    changed = [text.replace(text.split()[30], "changed") for text in texts]
    index = DuplicateIndex()
    assert index.add(texts) == [None] * 300
    found = index.add(changed)
    assert index.size == 600
    assert all(earlier in (None, number) for number, earlier in enumerate(found))
    assert sum(earlier is not None for earlier in found) >= 290
