"""Read human-rated pairs from an installed gensim, as an external check.

The sets are WordSim-353, SimLex-999 and the 50 news texts of Lee et al. (2005). They are not
copied.
"""

from __future__ import annotations

import csv
import importlib.util
from itertools import combinations
from pathlib import Path

import numpy as np

from taskvec_train.data.records import DataError, Scored


def read_human_rated() -> dict[str, list[Scored]]:
    """Return the scored pairs of each set. Raises DataError if gensim is not installed."""
    found = importlib.util.find_spec("gensim")
    if found is None or found.origin is None:
        raise DataError("The human-rated sets are part of gensim: install gensim.")
    return read_gensim(Path(found.origin).parent / "test/test_data")


def read_gensim(folder: Path) -> dict[str, list[Scored]]:
    """Return the sets in gensim's folder of test data."""
    return {
        "wordsim-353": _words(folder / "wordsim353.tsv"),
        "simlex-999": _words(folder / "simlex999.txt"),
        "lee-50": _lee(folder / "lee.cor", folder / "similarities0-1.txt"),
    }


def _words(file: Path) -> list[Scored]:
    """Read lines of two words and a score; lines that start with # are comments."""
    lines = (line for line in file.read_text("utf-8").splitlines() if not line.startswith("#"))
    return [Scored(row[0], row[1], float(row[2])) for row in csv.reader(lines, delimiter="\t")]


def _lee(texts: Path, similarities: Path) -> list[Scored]:
    lines = texts.read_text("latin-1").splitlines()
    scores = np.loadtxt(similarities)
    return [
        Scored(lines[one], lines[other], float(scores[one, other]))
        for one, other in combinations(range(len(lines)), 2)
    ]
