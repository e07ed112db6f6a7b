"""LiteLLM's rerankers, which speak the APIs of Jina, Cohere and text-embeddings-inference."""

from __future__ import annotations

from typing import Any

import httpx
import litellm
import numpy as np
import pytest

from real_clients.calls import PASSAGE, QUERY

MODEL = "taskvec-mini"
SEARCH = "how do plants make food"
DOCUMENTS = ["the bank raised its rates", "leaves turn light into sugar", "a train was late"]
DIFFERENCE = 2e-3
"""Of cosines of bfloat16 vectors, between batches."""


def cosines(url: str) -> list[float]:
    """The cosines of the vectors of /v1/embeddings."""
    items = [{"text": SEARCH, "task": QUERY}] + [{"text": d, "task": PASSAGE} for d in DOCUMENTS]
    answer = httpx.post(f"{url}/v1/embeddings", json={"input": items}, timeout=30)
    vectors = np.array([entry["embedding"] for entry in answer.json()["data"]])
    cosines: list[float] = (vectors[1:] @ vectors[0]).tolist()
    return cosines


def rerank(provider: str, url: str, key: str) -> list[dict[str, Any]]:
    """Rank the documents with LiteLLM."""
    answer = litellm.rerank(
        model=f"{provider}/{MODEL}",
        query=SEARCH,
        documents=DOCUMENTS,
        top_n=2,
        api_base=url,
        api_key=key,
    )
    return [dict(result) for result in answer.results]


@pytest.mark.parametrize("provider", ["jina_ai", "cohere", "huggingface"])
def test_ranking(provider: str, url: str, keyed_url: str) -> None:
    """The best documents come first, with the cosines of their vectors, also with a key."""
    truth = cosines(url)
    best = sorted(range(len(truth)), key=lambda i: -truth[i])[:2]
    for where, key in ((url, "none"), (keyed_url, "s3cret")):
        results = rerank(provider, where, key)
        assert [result["index"] for result in results] == best
        for result in results:
            assert abs(result["relevance_score"] - truth[result["index"]]) < DIFFERENCE


@pytest.mark.parametrize("provider", ["jina_ai", "cohere", "huggingface"])
def test_a_wrong_key(provider: str, keyed_url: str) -> None:
    """The client raises an error with our sentence."""
    with pytest.raises(Exception, match="Unknown API key"):
        rerank(provider, keyed_url, "wrong")
