"""The newest clients of all embedding APIs, unchanged, against real servers.

Vectors are compared with those of /v1/embeddings. What a client cannot do is in traits.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from real_clients.calls import PASSAGE, QUERY, Call, RefusedError
from real_clients.traits import NODE, PYTHON, Client
from sockets import served
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.errors import QueueFullError, UnavailableError

BF16_DIFFERENCE = 1e-3
"""Documented maximum difference per component between batches."""

TEXTS = ("how do plants make food", "the bank raised its rates")
MANY = tuple(f"text number {n}" for n in range(1200))
LONG = "the quick brown fox " * 3000
CLIENTS = [
    *(pytest.param(client, id=f"node: {client.name}") for client in NODE),
    *(pytest.param(client, id=f"python: {client.name}") for client in PYTHON),
]
REFUSALS = [
    QueueFullError("The queue is full: try again later.", retry_after=0.1),
    UnavailableError("The engine does not embed now: try again later.", retry_after=0.1),
]

Embed = Callable[[Client, Call], list[list[float]]]


def expected(url: str, texts: tuple[str, ...], client: Client, task: str, **fields: Any) -> Any:
    """The vectors of /v1/embeddings."""
    if not client.sides:
        task = "text-matching"
    body = {"input": texts, "task": task, **fields}
    answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=30)
    return np.array([entry["embedding"] for entry in answer.json()["data"]])


def assert_same(vectors: Any, truth: Any) -> None:
    """Vectors of two requests with the same texts are the same within bfloat16."""
    np.testing.assert_allclose(np.array(vectors), truth, rtol=0, atol=BF16_DIFFERENCE)


@pytest.mark.parametrize("client", CLIENTS)
def test_vectors(embed: Embed, client: Client, url: str, keyed_url: str) -> None:
    """Queries and passages get the vectors of their own task, with a key and without."""
    truths = [expected(url, TEXTS, client, task) for task in (QUERY, PASSAGE)]
    different = np.abs(truths[0] - truths[1]).max() > 20 * BF16_DIFFERENCE
    assert different == client.sides
    for task, truth in zip((QUERY, PASSAGE), truths, strict=True):
        assert_same(embed(client, Call(url, TEXTS, task)), truth)
        assert_same(embed(client, Call(url, TEXTS[:1], task)), truth[:1])
        assert_same(embed(client, Call(keyed_url, TEXTS, task, key="s3cret")), truth)


@pytest.mark.parametrize("client", CLIENTS)
def test_many(embed: Embed, client: Client, url: str) -> None:
    """1,200 short texts get their own vectors, in one request or in the client's batches."""
    truth = expected(url, MANY, client, PASSAGE)
    assert_same(embed(client, Call(url, MANY)), truth)


@pytest.mark.parametrize("client", [c for c in CLIENTS if c.values[0].dimensions])
def test_dimensions(embed: Embed, client: Client, url: str) -> None:
    """Truncated vectors are those of /v1/embeddings."""
    truth = expected(url, TEXTS, client, PASSAGE, dimensions=64)
    assert_same(embed(client, Call(url, TEXTS, dimensions=64)), truth)


@pytest.mark.parametrize(
    ("client", "kind"),
    [
        pytest.param(c.values[0], kind, id=f"{c.id}, {kind}")
        for c in CLIENTS
        for kind in c.values[0].types
    ],
)
def test_types(embed: Embed, client: Client, kind: str, url: str) -> None:
    """Quantised vectors have the numbers of /v1/embeddings, not their bytes read as floats."""
    vectors = np.array(embed(client, Call(url, TEXTS, type=kind)))
    truth = expected(url, TEXTS, client, PASSAGE, embedding_type=kind)
    assert vectors.shape == truth.shape
    if kind.endswith("int8"):
        assert np.abs(vectors - truth).max() <= 1
    else:  # a value near zero may have either sign
        offset = 128 if kind == "binary" else 0
        bits = [np.unpackbits((each + offset).astype(np.uint8)) for each in (vectors, truth)]
        assert np.mean(bits[0] != bits[1]) < 0.02


@pytest.mark.parametrize("texts", [TEXTS[:1], MANY], ids=["one", "many"])
@pytest.mark.parametrize("client", [c for c in CLIENTS if c.values[0].unknown_task])
def test_an_unknown_task(embed: Embed, client: Client, url: str, texts: tuple[str, ...]) -> None:
    """The client's exception for 400 says which tasks there are."""
    assert_refused(embed, client, Call(url, texts, "poem"), 400, "clustering")


@pytest.mark.parametrize("texts", [TEXTS[:1], MANY], ids=["one", "many"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_wrong_key(embed: Embed, client: Client, keyed_url: str, texts: tuple[str, ...]) -> None:
    """The client's exception for 401 says that the key is unknown."""
    call = Call(keyed_url, texts, key="wrong")
    assert_refused(embed, client, call, 401, "Unknown API key")


@pytest.mark.parametrize("texts", [(LONG,), (*MANY[:700], LONG, *MANY[701:])], ids=["one", "many"])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_text_that_is_too_long(
    embed: Embed, client: Client, url: str, texts: tuple[str, ...]
) -> None:
    """The client's exception for 400 says how long texts may be, unless it asks for truncation."""
    call = Call(url, texts)
    if client.truncates:
        assert_same(embed(client, call), expected(url, texts, client, PASSAGE, truncate=True))
    else:
        assert_refused(embed, client, call, 400, "2048 tokens")


def assert_refused(embed: Embed, client: Client, call: Call, status: int, sentence: str) -> None:
    """A call raises the client's exception for a status, with our sentence in its message."""
    name = client.unauthorized if status == 401 else client.bad_request
    call = Call(**{**vars(call), "retries": client.fewest_retries})
    if client.swallows:  # the documents of the requests that were refused
        assert [] in embed(client, call)
        return
    with pytest.raises(RefusedError) as refused:
        embed(client, call)
    assert refused.value.name == name
    assert refused.value.status in {None, status}
    shown = sentence.lower() in refused.value.message.lower()
    assert shown == (status not in client.hidden), refused.value.message


@pytest.mark.parametrize("refusal", REFUSALS, ids=["429", "503"])
@pytest.mark.parametrize("client", CLIENTS)
def test_retries(
    embed: Embed, client: Client, default_checkpoint: Checkpoint, refusal: Any
) -> None:
    """A request that was refused for a moment is repeated, or the exception has our sentence."""
    with served(default_checkpoint, model_aliases="embed-v4.0") as service:
        service.engine.refusals = [refusal]
        call = Call(f"http://127.0.0.1:{service.port}", TEXTS[:1], QUERY)
        if refusal.status in client.retried:
            assert len(embed(client, call)) == 1
        else:
            with pytest.raises(RefusedError) as refused:
                embed(client, call)
            shown = refusal.message in refused.value.message
            assert shown == (refusal.status not in client.hidden)
        assert not service.engine.refusals
