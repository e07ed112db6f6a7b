"""Bodies over real sockets: limits that hold before all is sent, and clients that leave."""

from __future__ import annotations

import json
import time

import pytest

from conftest import fake_service
from sockets import PATH, answer, head, hung_up, served, wait_for, whole
from taskvec.checkpoint.checkpoint import Checkpoint


@pytest.mark.parametrize("expect", [[], ["Expect: 100-continue"]], ids=["plain", "expect"])
def test_a_gigabyte_is_refused_by_its_header(
    default_checkpoint: Checkpoint, expect: list[str]
) -> None:
    """A declared length over the limit is a 413 at once, without asking for the body."""
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(head("Content-Length: 1000000000", *expect))
        if not expect:
            connection.sendall(b'{"input": "' + b"a" * 4096)
        response, body = answer(connection)
        assert (response.status, body["code"]) == (413, "body_too_large")
        assert response.headers["connection"] == "close"
        assert hung_up(connection)
        assert service.sample("taskvec_requests_total", status="413") == 1


def test_a_chunked_body_is_cut_at_the_limit(default_checkpoint: Checkpoint) -> None:
    """Chunks without end are a 413 as soon as they pass the limit."""
    chunk = b"3e8\r\n" + b"a" * 1000 + b"\r\n"
    with (
        served(default_checkpoint, max_body_bytes=10_000) as service,
        service.connect() as connection,
    ):
        connection.sendall(head("Transfer-Encoding: chunked") + 11 * chunk)
        response, body = answer(connection)
        assert (response.status, body["code"]) == (413, "body_too_large")
        assert hung_up(connection)


def test_a_chunked_body_within_the_limit(default_checkpoint: Checkpoint) -> None:
    """A body that comes in small chunks, with pauses, is put together again."""
    content = json.dumps({"input": "a longer text", "dimensions": 8}).encode()
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        for start in range(0, len(content), 7):
            piece = content[start : start + 7]
            connection.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
            time.sleep(0.005)
        connection.sendall(b"0\r\n\r\n")
        response, body = answer(connection)
        assert response.status == 200
        assert len(body["data"][0]["embedding"]) == 8


def test_a_slow_body(default_checkpoint: Checkpoint) -> None:
    """A body that does not come within its time is a 408, and holds nothing."""
    with (
        served(default_checkpoint, body_timeout=0.3) as service,
        service.connect() as connection,
    ):
        connection.sendall(head("Content-Length: 1000") + b'{"input": ')
        connection.settimeout(5)
        response, body = answer(connection)
        assert (response.status, body["error"]["type"]) == (408, "invalid_request_error")
        assert hung_up(connection)


def test_a_client_that_leaves_frees_the_engine(default_checkpoint: Checkpoint) -> None:
    """The engine's work is cancelled, its room is given back, and status 499 is counted."""
    with served(default_checkpoint, delay=60, max_queue_tokens=1) as service:
        for number in (1, 2):
            with service.connect() as connection:
                connection.sendall(whole({"input": "some text", "task": "clustering"}))
                wait_for(lambda number=number: len(service.engine.batches) == number)
                assert service.sample("taskvec_requests_in_flight") == 1
            wait_for(lambda number=number: service.engine.cancelled == number)
        left = {"status": "499", "task": "clustering"}
        wait_for(lambda: service.sample("taskvec_requests_total", **left) == 2)
        assert service.sample("taskvec_texts_total", **left) == 2
        assert service.sample("taskvec_tokens_total", **left) == 0
        assert service.sample("taskvec_requests_in_flight") == 0


def test_a_client_that_leaves_at_once(default_checkpoint: Checkpoint) -> None:
    """A request whose client does not even wait is a 499 too, whoever notices."""
    with served(default_checkpoint, delay=60) as service:
        with service.connect() as connection:
            connection.sendall(whole({"input": "some text"}))
        wait_for(lambda: service.sample("taskvec_requests_total", status="499") == 1)
        assert len(service.engine.batches) == service.engine.cancelled


def test_a_client_that_leaves_while_sending(default_checkpoint: Checkpoint) -> None:
    """Half a body counts as 499 without a task, and the engine never hears of it."""
    with served(default_checkpoint) as service:
        with service.connect() as connection:
            connection.sendall(head("Content-Length: 1000") + b'{"input": ')
            wait_for(lambda: service.sample("taskvec_requests_in_flight") == 1)
        wait_for(lambda: service.sample("taskvec_requests_total", status="499", task="none") == 1)
        assert not service.engine.batches


def test_the_next_request_on_a_connection_is_not_lost(default_checkpoint: Checkpoint) -> None:
    """Watching for a client that leaves does not swallow what it sends next."""
    with served(default_checkpoint, delay=0.2) as service, service.connect() as connection:
        connection.sendall(whole({"input": "a", "dimensions": 8}))
        wait_for(lambda: service.engine.batches)
        time.sleep(0.05)  # past the moment from which the connection is watched
        connection.sendall(whole({"input": "b", "dimensions": 16}))
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 2 or not received.endswith(b"}}"):
            piece = connection.recv(65536)
            assert piece, "the server hung up"
            received += piece
        bodies = [part.partition(b"\r\n\r\n")[2] for part in received.split(b"HTTP/1.1")[1:]]
        assert [len(json.loads(body)["data"][0]["embedding"]) for body in bodies] == [8, 16]
        assert service.engine.cancelled == 0


@pytest.mark.anyio
@pytest.mark.parametrize("declared", [str(2**64), "9" * 5000])
async def test_an_absurd_content_length(default_checkpoint: Checkpoint, declared: str) -> None:
    """A Content-Length of any number of digits is a 413 like any other that is too large."""
    headers = {"content-length": declared}
    async with fake_service(default_checkpoint) as (client, _):
        refused = await client.post(PATH, content=b"{}", headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (413, "body_too_large")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("accept", "raw"),
    [
        (["application/octet-stream"], True),
        (["Application/Octet-Stream; Q=0.5, text/plain"], True),
        (["application/json, application/octet-stream"], True),
        (["application/octet-stream;q=0.5, */*;q=0.1"], True),
        (["application/json;q=0.5", "application/octet-stream"], True),
        (["application/octet-stream;q=0, application/json"], False),
        (["application/octet-stream; q=0.000"], False),
        (["application/json, application/octet-stream;q=0.9"], False),
        (["application/octet-stream;q=0.5, application/*"], False),
        (["*/*"], False),
        (["application/octet-stream2"], False),
    ],
)
async def test_the_weights_of_accept(
    default_checkpoint: Checkpoint, accept: list[str], raw: bool
) -> None:
    """Bytes go to clients that name them and do not prefer JSON; several lines are one list."""
    async with fake_service(default_checkpoint) as (client, _):
        answer = await client.post(
            "/v1/embeddings", json={"input": "a"}, headers=[("accept", line) for line in accept]
        )
    kind = "application/octet-stream" if raw else "application/json"
    assert answer.headers["content-type"] == kind


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("coding", "status"), [(["identity"], 200), (["identity", "gzip"], 415), (["gzip"], 415)]
)
async def test_content_encodings(
    default_checkpoint: Checkpoint, coding: list[str], status: int
) -> None:
    """A body that any of the headers declares as compressed is refused."""
    async with fake_service(default_checkpoint) as (client, _):
        answer = await client.post(
            "/v1/embeddings",
            content=b'{"input": "a"}',
            headers=[("content-encoding", line) for line in coding],
        )
    assert answer.status_code == status


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("charset", "text", "status"),
    [
        ("utf-8", "\xe9", 200),
        ('"UTF-8"', "\xe9", 200),
        ("iso-8859-1", "e", 200),
        ("iso-8859-1", "\xc3\xa9", 415),
        ("utf-16", "\xe9", 415),
    ],
)
async def test_the_character_set(
    default_checkpoint: Checkpoint, charset: str, text: str, status: int
) -> None:
    """A body in another character set than UTF-8 is not read as if it were UTF-8."""
    body = f'{{"input": "{text}"}}'.encode(charset.strip('"'))
    headers = {"content-type": f"application/json; charset={charset}"}
    async with fake_service(default_checkpoint) as (client, _):
        answer = await client.post("/v1/embeddings", content=body, headers=headers)
    assert answer.status_code == status
    assert status == 200 or answer.json()["code"] == "unsupported_charset"


@pytest.mark.anyio
@pytest.mark.parametrize(
    "kind",
    [None, "application/json", "Application/JSON; charset=utf-8", "application/vnd.api+json"],
)
async def test_a_right_content_type(default_checkpoint: Checkpoint, kind: str | None) -> None:
    """JSON is known by its type whatever its case, parameters and flavour, or by no type at all."""
    headers = {} if kind is None else {"content-type": kind}
    async with fake_service(default_checkpoint) as (client, _):
        embedded = await client.post(PATH, content=b'{"input": "a"}', headers=headers)
    assert embedded.status_code == 200
