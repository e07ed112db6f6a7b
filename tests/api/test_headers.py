"""Headers of every answer: the request's id, and where its time went."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import httpx
import numpy as np
import pytest

from conftest import fake_service
from fakes import FakeEngine
from taskvec.checkpoint.backbone import ModelCard
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineResult, TokenBatch
from taskvec.engines.wire import ADAPTERS_HEADER, WIRE_PATH, WIRE_TYPE, pack_texts
from taskvec.settings import TokenInput

PATH = "/v1/embeddings"
TEXT = {"input": "a"}
EVERY_VISIBLE = "".join(map(chr, range(0x21, 0x7F)))


@pytest.fixture
async def client(default_checkpoint: Checkpoint) -> AsyncIterator[httpx.AsyncClient]:
    async with fake_service(default_checkpoint) as (client, _):
        yield client


@pytest.mark.anyio
@pytest.mark.parametrize("given", ["x", "a" * 128, "req_01-AB.c/d:e", EVERY_VISIBLE])
async def test_a_valid_request_id_comes_back(client: httpx.AsyncClient, given: str) -> None:
    """1 to 128 visible ASCII characters are echoed on answers, and in the body of refusals."""
    headers = {"x-request-id": given}
    answer = await client.post(PATH, json=TEXT, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == given
    refused = await client.post(PATH, json={}, headers=headers)
    assert refused.headers["x-request-id"] == given
    assert refused.json()["request_id"] == given


@pytest.mark.anyio
@pytest.mark.parametrize(
    "given",
    [b"", b"a" * 129, b"two words", b" ", b"tab\there", "\xe9".encode("latin-1"), "€".encode()],
)
async def test_another_request_id_is_replaced(client: httpx.AsyncClient, given: bytes) -> None:
    """What is empty, too long, or not visible ASCII gives way to a new id."""
    for body in (TEXT, {}):
        answer = await client.post(PATH, json=body, headers={b"x-request-id": given})
        ids = answer.headers.get_list("x-request-id")
        assert len(ids) == 1
        assert re.fullmatch(r"[\x21-\x7e]{16,128}", ids[0])
        assert ids[0].encode() != given
    assert answer.json()["request_id"] == ids[0]


@pytest.mark.anyio
async def test_new_ids_differ(client: httpx.AsyncClient) -> None:
    """A request without an id gets one that no other request has."""
    ids = {(await client.get("/health/live")).headers["x-request-id"] for _ in range(20)}
    assert len(ids) == 20


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", PATH),
        ("GET", PATH),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/nothing"),
        ("GET", "/health/live"),
        ("GET", "/health/ready"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/docs"),
        ("GET", "/nowhere"),
    ],
)
async def test_every_answer_has_its_id_and_time(
    client: httpx.AsyncClient, method: str, path: str
) -> None:
    """x-request-id and openai-processing-ms are on every route's answers, good or bad."""
    answer = await client.request(method, path, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert int(answer.headers["openai-processing-ms"]) >= 0


@pytest.mark.anyio
@pytest.mark.parametrize("accept", ["application/json", "application/octet-stream"])
async def test_server_timing_has_the_stages(default_checkpoint: Checkpoint, accept: str) -> None:
    """Server-Timing has the four stages in order, in milliseconds, of JSON and of raw answers."""
    engine = FakeEngine(default_checkpoint.card, delay=0.15)
    async with fake_service(default_checkpoint, engine) as (client, _):
        answer = await client.post(PATH, json=TEXT, headers={"accept": accept})
    stages = stages_of(answer)
    assert [name for name, _ in stages] == ["tokenize", "queue", "engine", "encode"]
    milliseconds = dict(stages)
    assert milliseconds["engine"] == 150  # the fake engine reports its delay
    assert int(answer.headers["openai-processing-ms"]) >= 140
    assert milliseconds["queue"] == 0


@pytest.mark.anyio
async def test_a_refusal_before_any_stage_has_none(client: httpx.AsyncClient) -> None:
    """A request that is refused as it is read has no Server-Timing."""
    assert "server-timing" not in (await client.post(PATH, json={})).headers


@pytest.mark.anyio
@pytest.mark.parametrize("given", [None, "interactive", "bulk"])
async def test_the_class_reaches_the_engine(
    default_checkpoint: Checkpoint, given: str | None
) -> None:
    """x-priority says which share of the engine a request draws on; interactive is the default."""
    async with fake_service(default_checkpoint) as (client, engine):
        headers = {} if given is None else {"x-priority": given}
        assert (await client.post(PATH, json=TEXT, headers=headers)).status_code == 200
        assert engine.batches[-1].priority == (given or "interactive")


@pytest.mark.anyio
@pytest.mark.parametrize("given", ["", "Bulk", "urgent", "1"])
async def test_an_unknown_class_is_refused(client: httpx.AsyncClient, given: str) -> None:
    """The refusal names the header and the two classes."""
    answer = await client.post(PATH, json=TEXT, headers={"x-priority": given})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_priority"
    assert answer.json()["error"]["param"] == "x-priority"
    assert "interactive, bulk" in answer.json()["detail"]


@pytest.mark.anyio
async def test_a_text_that_is_too_long_was_tokenised(client: httpx.AsyncClient) -> None:
    """A refusal by the tokenizer has its stage, and none that did not happen."""
    answer = await client.post(PATH, json={"input": "word " * 3000})
    assert answer.status_code == 400
    assert [name for name, _ in stages_of(answer)] == ["tokenize"]


@pytest.mark.anyio
@pytest.mark.parametrize("last", ["queue", "engine"])
async def test_a_deadline_shows_where_it_passed(default_checkpoint: Checkpoint, last: str) -> None:
    """A 504 has the stages up to the one in which the time ran out, and how long that took."""
    engine = SlowEngine(default_checkpoint.card, delay=5, enters=last == "engine")
    async with fake_service(default_checkpoint, engine) as (client, _):
        answer = await client.post(PATH, json=TEXT, headers={"x-request-timeout-ms": "200"})
    assert answer.status_code == 504
    stages = dict(stages_of(answer))
    assert list(stages) == ["tokenize", "queue", "engine"][: 2 + (last == "engine")]
    assert 100 <= stages[last] < 2000


@pytest.mark.anyio
async def test_texts_of_a_gateway_have_stages_too(default_checkpoint: Checkpoint) -> None:
    """The route of other gateways tells its stages, though what it gets has been tokenised."""
    adapters, body = pack_texts([np.array([1, 2, 3], dtype=np.int32)], ["clustering"])
    headers = {"content-type": WIRE_TYPE, ADAPTERS_HEADER: adapters}
    async with fake_service(default_checkpoint, token_input=TokenInput.ACCEPT) as (client, _):
        answer = await client.post(WIRE_PATH, content=body, headers=headers)
    assert answer.status_code == 200
    assert [name for name, _ in stages_of(answer)] == ["tokenize", "queue", "engine", "encode"]


def stages_of(answer: httpx.Response) -> list[tuple[str, float]]:
    """The stages in a Server-Timing header, with their milliseconds."""
    found = re.findall(r"(\w+);dur=(\d+\.\d+)(?:, |$)", answer.headers["server-timing"])
    return [(name, float(value)) for name, value in found]


class SlowEngine(FakeEngine):
    """An engine whose texts enter a forward at once, or never."""

    def __init__(self, model: ModelCard, *, delay: float, enters: bool) -> None:
        super().__init__(model, delay=delay)
        self._enters = enters

    async def embed(self, batch: TokenBatch) -> EngineResult:
        if self._enters:
            batch.entered()
        return await super().embed(batch)
