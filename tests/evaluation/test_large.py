"""A corpus of a hundred thousand documents: memory."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.full("the evaluation of a large corpus")

MEASURE = """
from pathlib import Path
import numpy as np
from taskvec.core.output_format import OutputFormat, OutputType
from taskvec.evaluation.data import RetrievalData
from taskvec.evaluation.run import Plan, evaluate

DOCUMENTS, QUERIES = 100_000, 100
rng = np.random.default_rng(0)
truth = rng.normal(size=(DOCUMENTS, 256)).astype(np.float32)

class Known:
    name, dimension, matryoshka, tasks = "known", 256, (256,), ("embedding",)
    def embed(self, texts, task, advance):
        if len(texts) == DOCUMENTS:
            return truth
        return truth[:QUERIES] + rng.normal(size=(QUERIES, 256)).astype(np.float32) * 0.8

data = RetrievalData(
    name="large",
    documents=[f"Document number {n}, " + "some text in it " * 25 for n in range(DOCUMENTS)],
    queries=[f"query {n}" for n in range(QUERIES)],
    qrels=[{n: 1} for n in range(QUERIES)],
    identical_ids=[None] * QUERIES,
)
formats = [OutputFormat(256, (OutputType.FLOAT,)), OutputFormat(32, (OutputType.BINARY,))]
results = list(evaluate(Known(), Plan(data=[data], formats=formats, bm25=True)))
print(*(round(result.score.value, 3) for result in results))
# Of this process alone: getrusage includes what its parent used before the fork.
status = Path("/proc/self/status").read_text().splitlines()
print(*(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


def test_a_large_corpus_takes_less_than_a_gigabyte() -> None:
    """Memory stays below 1 GB: scores are chunked, vectors exist once raw and once per format."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=300
    )
    scores, kilobytes = done.stdout.splitlines()
    _, exact, binary, asymmetric = map(float, scores.split())
    assert exact == 1
    assert 0.1 < binary < asymmetric < 1
    assert int(kilobytes) < 1_000_000
