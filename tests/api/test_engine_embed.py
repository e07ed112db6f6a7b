"""POST /v1/engine/embed: token ids of several adapters in, raw vectors out, for other gateways."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import DEFAULT_VOCABULARY, examples, fake_service
from fakes import FakeEngine, hashed_vector
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineHealth, EngineResult, EngineState, TokenBatch, TokenIds
from taskvec.engines.wire import ADAPTERS_HEADER, WIRE_PATH, WIRE_TYPE, pack_texts
from taskvec.errors import TaskvecError

ACCEPT: dict[str, Any] = {"token_input": "accept"}
PATH = "/v1/engine/embed"
Names = Sequence[str | None]


class UnavailableEngine(FakeEngine):
    """Waits for something outside."""

    async def start(self) -> None:
        self._health = EngineHealth(EngineState.UNAVAILABLE, "no server answers")


@pytest.fixture
async def service(
    default_checkpoint: Checkpoint,
) -> AsyncIterator[tuple[httpx.AsyncClient, FakeEngine]]:
    async with fake_service(default_checkpoint, **ACCEPT) as service:
        yield service


@pytest.fixture
def client(service: tuple[httpx.AsyncClient, FakeEngine]) -> httpx.AsyncClient:
    return service[0]


async def ask(
    client: httpx.AsyncClient, texts: Sequence[TokenIds], adapters: Names, **headers: str
) -> httpx.Response:
    """Ask as a gateway does."""
    names, body = pack_texts(texts, adapters)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    sent = {"content-type": WIRE_TYPE, ADAPTERS_HEADER: names, **headers}
    return await client.post(PATH, content=body, headers=sent)


def ids(*values: int) -> TokenIds:
    """Token ids."""
    return np.array(values, dtype=np.int32)


def vectors_of(answer: httpx.Response, dimension: int) -> NDArray[np.float32]:
    """The matrix of a good answer."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == WIRE_TYPE
    return np.frombuffer(answer.content, dtype="<f4").reshape(-1, dimension)


def refused(answer: httpx.Response, status: int, code: str) -> str:
    """Check the status and the contract's whole form of an error; return its message."""
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), body
    assert answer.headers["content-type"] == "application/json"
    assert set(body) == {"error", "detail", "code", "request_id"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["code"] == code
    assert body["detail"] == body["error"]["message"]
    assert body["request_id"] == answer.headers["x-request-id"]
    return str(body["detail"])


@pytest.mark.anyio
async def test_adapters_mix_and_order_is_kept(
    service: tuple[httpx.AsyncClient, FakeEngine], default_checkpoint: Checkpoint
) -> None:
    """Each text gets its own adapter's vector, in the order sent and not normalised."""
    client, engine = service
    card = default_checkpoint.card
    names = [card.adapters[i % 3] for i in (0, 1, 0, 2, 2, 1, 0)]
    texts = [np.arange(7 * i, 8 * i + 1, dtype=np.int32) for i in range(len(names))]
    given_vectors = vectors_of(await ask(client, texts, names), card.dimension)
    truth = [
        hashed_vector(text, name, card.dimension) for text, name in zip(texts, names, strict=True)
    ]
    assert np.array_equal(given_vectors, np.stack(truth))
    assert sorted((batch.adapter, len(batch.ids)) for batch in engine.batches) == sorted(
        (name, names.count(name)) for name in set(names)
    )


@pytest.mark.anyio
async def test_one_adapter_is_one_batch(
    service: tuple[httpx.AsyncClient, FakeEngine], default_checkpoint: Checkpoint
) -> None:
    """Texts of one adapter reach the engine together, ids as sent and without any prompt."""
    client, engine = service
    card = default_checkpoint.card
    texts = [ids(5), ids(7, 8, 9), ids(0, card.vocabulary - 1)]
    answer = await ask(client, texts, ["retrieval"] * 3)
    truth = [hashed_vector(text, "retrieval", card.dimension) for text in texts]
    assert np.array_equal(vectors_of(answer, card.dimension), np.stack(truth))
    (batch,) = engine.batches
    assert [text.tolist() for text in batch.ids] == [text.tolist() for text in texts]


class PickyEngine(FakeEngine):
    """Gives no finite vector of a text that begins with 666, and has no memory for one with 667."""

    async def embed(self, batch: TokenBatch) -> EngineResult:
        result = await super().embed(batch)
        for i, text in enumerate(batch.ids):
            if text[0] == 667:
                where = f"input[{i}]"
                raise TaskvecError(f"Not {where}.", code="out_of_memory", param=where)
            if text[0] == 666:
                result.vectors[i] = np.nan
        return result


@pytest.mark.anyio
@pytest.mark.parametrize("cache", [{}, {"answer_cache_bytes": 1 << 20}])
@pytest.mark.parametrize(("first", "code"), [(666, "vector_not_finite"), (667, "out_of_memory")])
async def test_an_error_names_the_text_of_the_call(
    default_checkpoint: Checkpoint, cache: dict[str, int], first: int, code: str
) -> None:
    """The index is that in the call, although the engine gets a part of its texts."""
    engine = PickyEngine(default_checkpoint.card)
    async with fake_service(default_checkpoint, engine, **ACCEPT, **cache) as (client, _):
        texts = [ids(1), ids(2), ids(3), ids(first), ids(5)]
        adapters = ["retrieval", "clustering", "clustering", "clustering", "retrieval"]
        assert (await ask(client, texts[:3], adapters[:3])).status_code == 200
        answer = await ask(client, texts, adapters)
        assert "input[3]" in refused(answer, 500, code)
        assert answer.json()["error"]["param"] == "input[3]"


@pytest.mark.anyio
async def test_the_longest_texts_and_most_of_them_fit(
    client: httpx.AsyncClient, default_checkpoint: Checkpoint
) -> None:
    """A text of exactly the longest length, and exactly as many texts as allowed, are embedded."""
    card = default_checkpoint.card
    longest = np.full(card.max_tokens, 3, dtype=np.int32)
    answer = await ask(client, [longest], ["clustering"])
    assert len(vectors_of(answer, card.dimension)) == 1
    answer = await ask(client, [ids(1)] * 2048, ["clustering", "retrieval"] * 1024)
    assert len(vectors_of(answer, card.dimension)) == 2048


@pytest.mark.anyio
async def test_without_token_input_there_is_no_route(default_checkpoint: Checkpoint) -> None:
    """A service that takes no token ids from clients takes none here: a 404 like any other."""
    assert PATH == WIRE_PATH
    async with fake_service(default_checkpoint) as (client, engine):
        refused(await ask(client, [ids(1)], ["clustering"]), 404, "not_found")
    assert engine.batches == []


@pytest.mark.anyio
async def test_the_schema_does_not_show_it(client: httpx.AsyncClient) -> None:
    """It is between taskvec's own processes, no part of the public interface."""
    assert PATH not in (await client.get("/openapi.json")).json()["paths"]


@pytest.mark.anyio
@pytest.mark.parametrize(
    "kind", ["application/json", "text/plain", "application/octet-stream2", "", None]
)
async def test_a_wrong_content_type(client: httpx.AsyncClient, kind: str | None) -> None:
    """What is not declared as bytes is a 415: a client that meant /v1/embeddings is told so."""
    headers = {} if kind is None else {"content-type": kind}
    answer = await client.post(PATH, content=b'{"input": "a"}', headers=headers)
    assert "/v1/embeddings" in refused(answer, 415, "unsupported_media_type")


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_a_wrong_method(client: httpx.AsyncClient, method: str) -> None:
    """Another method than POST is a 405."""
    answer = await client.request(method, PATH)
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.anyio
@pytest.mark.parametrize("body", [b"", b"abc", b"\x00" * 4, b"\xff" * 400, b'{"input": "a"} '])
async def test_a_body_in_another_format(client: httpx.AsyncClient, body: bytes) -> None:
    """Bytes that no gateway sends are a 400, and one without an adapter header as well."""
    headers = {"content-type": WIRE_TYPE}
    refused(await client.post(PATH, content=body, headers=headers), 400, "invalid_body")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("text", "adapter", "code", "word"),
    [
        (ids(*[1] * 2049), "clustering", "input_too_long", "2048"),
        (ids(DEFAULT_VOCABULARY), "clustering", "invalid_token_id", str(DEFAULT_VOCABULARY - 1)),
        (ids(1, 2, -1), "clustering", "invalid_token_id", str(DEFAULT_VOCABULARY - 1)),
        (ids(2**31 - 1), "clustering", "invalid_token_id", str(DEFAULT_VOCABULARY - 1)),
        (ids(1), "poetry", "unknown_adapter", "'poetry'"),
        (ids(1), "retrieval.query", "unknown_adapter", "'retrieval.query'"),
        (ids(1), "x" * 5000, "unknown_adapter", "xxx"),
        (ids(1), None, "unknown_adapter", "adapter"),
    ],
)
async def test_one_wrong_text_refuses_the_call(
    service: tuple[httpx.AsyncClient, FakeEngine],
    text: TokenIds,
    adapter: str | None,
    code: str,
    word: str,
) -> None:
    """A text that the model cannot take is a 400, and those beside it are not embedded either."""
    client, engine = service
    message = refused(
        await ask(client, [ids(1), text, ids(2)], ["retrieval", adapter, "clustering"]), 400, code
    )
    assert word in message
    assert len(message) < 300
    assert engine.batches == []


@pytest.mark.anyio
async def test_too_many_texts(default_checkpoint: Checkpoint) -> None:
    """The limit is the setting's; one text more is a 400."""
    async with fake_service(default_checkpoint, max_texts=5, **ACCEPT) as (client, _):
        assert (await ask(client, [ids(1)] * 5, ["retrieval"] * 5)).status_code == 200
        answer = await ask(client, [ids(1)] * 6, ["retrieval"] * 6)
        assert "at most 5" in refused(answer, 400, "too_many_inputs")


@pytest.mark.anyio
async def test_millions_of_texts_are_refused_before_they_are_unpacked(
    client: httpx.AsyncClient,
) -> None:
    """Counting them does not keep the event loop from its other work."""
    texts = 2_600_000
    head = np.tile(np.array([0, 1], dtype="<i4"), texts)
    body = np.concatenate([[texts], head, np.full(texts, 5)], dtype="<i4").tobytes()
    headers = {"content-type": WIRE_TYPE, ADAPTERS_HEADER: "retrieval"}
    for _ in range(10):
        longest = 0.0
        call = asyncio.create_task(client.post(PATH, content=body, headers=headers))
        while not call.done():
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, time.perf_counter() - began)
        if (await call).status_code != 429:  # httpx sends the body in the same loop: it may be late
            break
    assert "2600000 texts" in refused(await call, 400, "too_many_inputs")
    assert longest < 0.5  # half of it is httpx in the same loop; unpacking them took 2 s


@pytest.mark.anyio
@pytest.mark.parametrize("wrong", [0, 1024, 2047])
async def test_many_texts_are_checked_like_few(
    service: tuple[httpx.AsyncClient, FakeEngine], wrong: int
) -> None:
    """One wrong id among as many texts as are allowed refuses the call."""
    client, engine = service
    texts = [ids(1, 2, 3)] * 2048
    texts[wrong] = ids(1, DEFAULT_VOCABULARY)
    answer = await ask(client, texts, ["retrieval"] * 2048)
    refused(answer, 400, "invalid_token_id")
    assert engine.batches == []


@pytest.mark.anyio
async def test_the_server_s_shorter_limit_holds(default_checkpoint: Checkpoint) -> None:
    """Where the operator allows shorter texts alone, longer ids are refused."""
    async with fake_service(default_checkpoint, max_tokens=4, **ACCEPT) as (client, _):
        assert (await ask(client, [ids(1, 2, 3, 4)], ["retrieval"])).status_code == 200
        answer = await ask(client, [ids(1, 2, 3, 4, 5)], ["retrieval"])
        refused(answer, 400, "input_too_long")


@pytest.mark.anyio
async def test_a_body_over_the_limit(default_checkpoint: Checkpoint) -> None:
    """A byte too many is a 413."""
    texts, names = [ids(*range(50))], ["retrieval"]
    size = len(pack_texts(texts, names)[1])
    async with fake_service(default_checkpoint, max_body_bytes=size, **ACCEPT) as (client, _):
        assert (await ask(client, texts, names)).status_code == 200
        refused(await ask(client, [ids(*range(51))], names), 413, "body_too_large")


@pytest.mark.anyio
@pytest.mark.parametrize("adapters", [["retrieval"] * 3, ["retrieval", "clustering", "retrieval"]])
async def test_a_passed_deadline_is_told(default_checkpoint: Checkpoint, adapters: Names) -> None:
    """After the gateway's deadline the answer is a 504, and the engine's work is withdrawn."""
    engine = FakeEngine(default_checkpoint.card, delay=60)
    async with fake_service(default_checkpoint, engine, **ACCEPT) as (client, _):
        answer = await ask(client, [ids(1)] * 3, adapters, x_request_timeout_ms="50")
        refused(answer, 504, "deadline_exceeded")
        assert answer.headers["x-should-retry"] == "false"
    assert len(engine.batches) == len(set(adapters))
    assert engine.cancelled == len(engine.batches)
    assert all(batch.deadline is not None for batch in engine.batches)


@pytest.mark.anyio
@pytest.mark.parametrize("asked", ["0", "-5", "1.5", "soon", ""])
async def test_a_wrong_deadline(client: httpx.AsyncClient, asked: str) -> None:
    """A deadline that is no positive number of milliseconds is a 400."""
    answer = await ask(client, [ids(1)], ["retrieval"], x_request_timeout_ms=asked)
    refused(answer, 400, "invalid_timeout")


@pytest.mark.anyio
async def test_an_engine_that_waits_is_a_503(default_checkpoint: Checkpoint) -> None:
    """While the engine cannot embed, gateways are told when to come back."""
    engine = UnavailableEngine(default_checkpoint.card)
    async with fake_service(default_checkpoint, engine, **ACCEPT) as (client, _):
        answer = await ask(client, [ids(1), ids(2)], ["retrieval", "clustering"])
        assert "no server answers" in refused(answer, 503, "engine_unavailable")
        assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.anyio
@pytest.mark.parametrize("adapters", [["retrieval"] * 2, ["retrieval", "clustering"]])
async def test_a_call_larger_than_the_queue_is_admitted_alone(
    default_checkpoint: Checkpoint, adapters: Names
) -> None:
    """A call is admitted as a whole: mixed adapters are no reason to refuse it for ever."""
    async with fake_service(default_checkpoint, max_queue_tokens=10, **ACCEPT) as (client, _):
        answer = await ask(client, [ids(*range(8))] * 2, adapters)
        assert len(vectors_of(answer, default_checkpoint.card.dimension)) == 2


@pytest.mark.anyio
async def test_a_full_queue_is_a_429(default_checkpoint: Checkpoint) -> None:
    """While there is no room, gateways are told when there should be."""
    engine = FakeEngine(default_checkpoint.card, delay=60)
    async with fake_service(default_checkpoint, engine, max_queue_tokens=10, **ACCEPT) as (
        client,
        _,
    ):
        first = asyncio.create_task(ask(client, [ids(*range(8))], ["retrieval"]))
        while not engine.batches:
            await asyncio.sleep(0.005)
        answer = await ask(client, [ids(*range(8))], ["clustering"])
        refused(answer, 429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


def test_no_body_gives_a_500(default_checkpoint: Checkpoint) -> None:
    """Whatever the bytes and headers, the answer is vectors or a refusal in the contract's form."""
    with asyncio.Runner() as runner:
        service = fake_service(default_checkpoint, **ACCEPT)
        client, _ = runner.run(service.__aenter__())
        number = st.integers(-2, 9) | st.integers(-(2**31), 2**31 - 1)
        listed = st.lists(number, max_size=30).map(lambda n: np.array(n, "<i4").tobytes())
        name = st.sampled_from(["", "retrieval", "clustering,", "a", ",", "clustering,retrieval"])

        text = st.lists(st.integers(-1, 30_000), min_size=1, max_size=9).map(lambda n: ids(*n))
        packed = st.lists(text, min_size=1, max_size=4).map(
            lambda texts: pack_texts(texts, [str(i % 2) for i in range(len(texts))])[1]
        )

        @given(packed | listed | st.binary(max_size=100), name | st.text(max_size=20))
        @settings(max_examples=examples(200), suppress_health_check=[HealthCheck.too_slow])
        def check(body: bytes, names: str) -> None:
            headers = {
                b"content-type": WIRE_TYPE.encode(),
                ADAPTERS_HEADER.encode(): names.encode("utf-8", "surrogatepass"),
            }
            answer = runner.run(client.post(PATH, content=body, headers=headers))
            if answer.status_code == 200:
                count = int.from_bytes(body[:4], "little")
                assert len(vectors_of(answer, default_checkpoint.card.dimension)) == count
            else:
                assert answer.status_code == 400
                refused(answer, 400, answer.json()["code"])

        try:
            check()
        finally:
            runner.run(service.__aexit__(None, None, None))
