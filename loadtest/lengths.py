"""How long texts are: those of MS MARCO, real questions to a web search and passages of web pages.

Its queries have 5.96 words on average, its passages 55.98 (Thakur et al., BEIR, 2021, table 1):
what a search service embeds one by one and in bulk. The means are theirs; that lengths are
log-normal, as lengths of texts mostly are, and how wide, is assumed here.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

QUERY = (5.96, 0.5)
PASSAGE = (55.98, 0.8)
"""Mean words, and the standard deviation of their logarithm."""

LONGEST = 512

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
    """Whole lengths of this mean, at least 2 and at most ``LONGEST``."""
    drawn = random.lognormal(np.log(mean) - 0.5 * sigma**2, sigma, texts).astype(int)
    return np.clip(drawn, 2, LONGEST)


def some_text(lengths: tuple[float, float], dice: random.Random) -> str:
    """A text that was hardly sent before: no cache answers it.

    Args:
        lengths: ``QUERY`` or ``PASSAGE``.
        dice: equal dice give equal texts.
    """
    mean, sigma = lengths
    words = round(dice.lognormvariate(np.log(mean) - 0.5 * sigma**2, sigma))
    return " ".join(dice.choices(WORDS, k=min(max(words, 2), LONGEST)))
