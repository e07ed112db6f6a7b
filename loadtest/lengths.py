"""Text lengths as in MS MARCO: questions to a web search and passages of web pages.

Its queries have 5.96 words on average, its passages 55.98 (Thakur et al., BEIR, 2021, table 1). A
search service embeds the former one by one and the latter in bulk. The log-normal distribution,
usual for text lengths, and its width are assumptions.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

QUERY = (5.96, 0.5)
PASSAGE = (55.98, 0.8)
"""Mean words, and the standard deviation of their logarithm."""

MAX_WORDS = 512
"""Maximum words in a text."""

# Frequent English words: one token each in most vocabularies.
WORDS = """
about after again all also always another answer any around ask back because been before begin
being between both build call change city close come could country day different does door down
each earth end even every example face family far father few find first follow food form found
give good great group grow hand hard head help here high home house idea important keep kind know
land large last learn leave left letter life light line list little live long look made make many
might money more most mother mountain move much must name near never next night number often old
only open order other over page paper part people place plant play point read right river room
run same school sea second see seem sentence set should show side small something sometimes sound
space spell stand start state still stop story study such system table take talk tell than their
these thing think those thought three through time together took tree turn under until water way
well went what where which while white why wind without word work world would write year young
""".split()  # noqa: SIM905 - a list literal would take a line a word


def log_normal(
    mean: float, sigma: float, texts: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Draw integer lengths with this mean, from 2 to ``MAX_WORDS``."""
    drawn = random.lognormal(np.log(mean) - 0.5 * sigma**2, sigma, texts).astype(int)
    return np.clip(drawn, 2, MAX_WORDS)


def some_text(lengths: tuple[float, float], rng: random.Random) -> str:
    """Return a random text, which is almost certainly in no cache.

    Args:
        lengths: ``QUERY`` or ``PASSAGE``.
        rng: source of randomness; the same seed gives the same texts.
    """
    mean, sigma = lengths
    words = round(rng.lognormvariate(np.log(mean) - 0.5 * sigma**2, sigma))
    return " ".join(rng.choices(WORDS, k=min(max(words, 2), MAX_WORDS)))
