"""Human-rated sets in gensim's layout."""

from __future__ import annotations

from pathlib import Path

from taskvec_train.data.human_rated import read_gensim
from taskvec_train.data.records import Scored


def test_the_sets_are_read_from_gensims_files(tmp_path: Path):
    """Comments are skipped, and each pair of the similarity matrix is read once."""
    for name in ("wordsim353.tsv", "simlex999.txt"):
        (tmp_path / name).write_text("# Word 1\tWord 2\tMean\nold\tnew\t1.58\n")
    (tmp_path / "lee.cor").write_text("one £\nanother text\na third\n", "latin-1")
    (tmp_path / "similarities0-1.txt").write_text("1 0.2 0.3\n0.2 1 0.4\n0.3 0.4 1\n")
    sets = read_gensim(tmp_path)
    assert sets["wordsim-353"] == sets["simlex-999"] == [Scored("old", "new", 1.58)]
    assert sets["lee-50"] == [
        Scored("one £", "another text", 0.2),
        Scored("one £", "a third", 0.3),
        Scored("another text", "a third", 0.4),
    ]
