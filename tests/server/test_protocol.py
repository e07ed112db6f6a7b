"""Connections over real sockets: what comes before a request has bounds in time, size, number."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, suppress

import httpx
import pytest

from sockets import PATH, answer, head, hung_up, served, wait_for, whole
from taskvec.checkpoint.checkpoint import Checkpoint

FORM = {"error", "detail", "code", "request_id"}
LIVE = b"GET /health/live HTTP/1.1\r\nHost: test\r\n\r\n"


def test_headers_that_never_end_are_timed_out(default_checkpoint: Checkpoint) -> None:
    """Half a head is a 408 after the header timeout, however often another byte comes."""
    with (
        served(default_checkpoint, header_timeout=0.3) as service,
        service.connect() as connection,
    ):
        began = time.monotonic()
        connection.sendall(LIVE[:-4])
        for _ in range(4):
            time.sleep(0.05)
            connection.sendall(b"a")
        response, body = answer(connection)
        assert 0.25 < time.monotonic() - began < 5
        assert (response.status, body["code"]) == (408, "header_timeout")
        assert response.headers["connection"] == "close"
        assert response.headers["x-request-id"] == body["request_id"]
        assert set(body) == FORM
        assert hung_up(connection)


def test_a_silent_connection_is_closed(default_checkpoint: Checkpoint) -> None:
    """Who connects and says nothing is hung up on without a word."""
    with (
        served(default_checkpoint, header_timeout=0.2) as service,
        service.connect() as connection,
    ):
        assert hung_up(connection)


def test_the_next_request_has_the_timeout_of_the_first(default_checkpoint: Checkpoint) -> None:
    """An idle connection is kept; from the next request's first byte on, its head is timed."""
    with (
        served(default_checkpoint, header_timeout=0.3) as service,
        service.connect() as connection,
    ):
        for _ in range(2):
            connection.sendall(LIVE)
            assert answer(connection)[0].status == 200
            time.sleep(0.5)
        connection.sendall(LIVE[:5])
        assert answer(connection)[1]["code"] == "header_timeout"
        assert hung_up(connection)


def test_the_rest_of_a_refused_body_is_passed_over(default_checkpoint: Checkpoint) -> None:
    """What comes behind an early answer neither spoils the connection nor keeps it for ever."""
    refused = head("Content-Length: 10").replace(b"application/json", b"text/plain")
    with (
        served(default_checkpoint, header_timeout=0.3) as service,
        service.connect() as connection,
    ):
        for rest in (b"aaaaa", b"aaaaa\r\n"):
            connection.sendall(refused + b"aaaaa")
            assert answer(connection)[0].status == 415
            connection.sendall(rest)
            time.sleep(0.5)  # longer than a head may take
        connection.sendall(LIVE)
        assert answer(connection)[0].status == 200
        connection.sendall(refused)
        assert answer(connection)[0].status == 415
        connection.sendall(b"a")
        assert hung_up(connection)


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET /health/live HTTP/1.1\r\nHost: test\r\nx-a: " + 20_000 * b"a",
        b"GET /health/live HTTP/1.1\r\nHost: test\r\n" + 90 * (b"x-a: " + 90 * b"a" + b"\r\n"),
        b"GET /" + 9000 * b"a" + b" HTTP/1.1\r\nHost: test\r\n\r\n",
    ],
    ids=["one value", "many headers", "address"],
)
def test_large_headers(default_checkpoint: Checkpoint, request_head: bytes) -> None:
    """A head over the limit is a 431 as soon as it passes it."""
    with (
        served(default_checkpoint, max_header_bytes=8000) as service,
        service.connect() as connection,
    ):
        with suppress(BrokenPipeError, ConnectionResetError):
            for begin in range(0, len(request_head), 1000):
                connection.sendall(request_head[begin : begin + 1000])
                time.sleep(0.002)
        response, body = answer(connection)
        assert (response.status, body["code"]) == (431, "headers_too_large")
        assert "8000 bytes" in body["detail"]
        assert hung_up(connection)


def test_headers_up_to_the_limit(default_checkpoint: Checkpoint) -> None:
    """A head just within the limit is answered, on one connection again and again."""
    padded = LIVE.replace(b"Host: test", b"Host: test\r\nx-a: " + 7900 * b"a")
    with (
        served(default_checkpoint, max_header_bytes=8000) as service,
        service.connect() as connection,
    ):
        for _ in range(3):
            connection.sendall(padded)
            assert answer(connection)[0].status == 200


@pytest.mark.parametrize(
    "trailer", [b"x-a: " + 20_000 * b"a", 90 * (b"x-a: " + 90 * b"a" + b"\r\n")]
)
def test_trailers_without_end(default_checkpoint: Checkpoint, trailer: bytes) -> None:
    """What follows a chunked body counts as headers do."""
    with (
        served(default_checkpoint, max_header_bytes=8000) as service,
        service.connect() as connection,
    ):
        connection.sendall(head("Transfer-Encoding: chunked") + b"0\r\n")
        time.sleep(0.05)
        connection.sendall(trailer[:5000])
        time.sleep(0.05)
        connection.sendall(trailer[5000:])
        response, body = answer(connection)
        assert (response.status, body["code"]) == (431, "headers_too_large")
        assert hung_up(connection)


@pytest.mark.parametrize(
    "sent",
    [
        b"hello\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS, spoken to a plain port
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: test\r\n\r\n",
        b"GET http://test HTTP/1.1\r\nHost: test\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nHost: test\r\nhost: test\r\n\r\n",
        b"GET /health/live HTTP/1.0\r\nHost: test\r\nHost: other\r\n\r\n",
        head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        head("Content-Length: -1"),
        head("Transfer-Encoding: chunked") + b"no number\r\n",
    ],
)
def test_what_is_not_http(default_checkpoint: Checkpoint, sent: bytes) -> None:
    """Malformed requests are a 400 in the form of every other error, and the end of the line."""
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(sent)
        response, body = answer(connection)
        assert (response.status, body["code"]) == (400, "invalid_http")
        assert response.headers["content-type"] == "application/json"
        assert set(body) == FORM
        assert hung_up(connection)


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_every_route_answers_with_and_without_a_slash(
    default_checkpoint: Checkpoint, method: bytes
) -> None:
    """Both are the route itself, for GET and HEAD: a redirect would name this host and scheme."""
    paths = ["/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json", "/v1/models"]
    paths += ["/v1/models/taskvec-mini", "/v1/models/taskvec-mini:clustering"]
    with served(default_checkpoint) as service:
        base = f"http://127.0.0.1:{service.port}"
        for path in paths:
            for slash in ("", "/"):
                reply = httpx.request(method.decode(), f"{base}{path}{slash}")
                assert reply.status_code == 200, path + slash
                assert bool(reply.content) == (method == b"GET")
                assert int(reply.headers["content-length"]) > 0
        sent = httpx.post(f"{base}{PATH}/", json={"input": "a"}, headers={"host": "proxy.test"})
        assert len(sent.json()["data"]) == 1
        assert httpx.get(f"{base}/docs/../openapi.json").status_code == 200
        assert '"../openapi.json"' in httpx.get(f"{base}/docs/").text.replace("'", '"')
        assert '"./openapi.json"' in httpx.get(f"{base}/docs").text.replace("'", '"')
        refused = httpx.head(f"{base}{PATH}/")
        assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("coding", ["gzip, chunked", "chunked, chunked", "deflate,chunked"])
def test_another_transfer_coding(default_checkpoint: Checkpoint, coding: str) -> None:
    """A body that is compressed in transfer is refused, not taken as it is."""
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(
            head(f"Transfer-Encoding: {coding}") + b'e\r\n{"input": "a"}\r\n0\r\n\r\n'
        )
        response, body = answer(connection)
        assert response.status == 400
        assert body["code"] in {"unsupported_transfer_encoding", "invalid_http"}
        assert hung_up(connection)


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/v1/models", "/metrics"])
def test_head_is_get_without_a_body(default_checkpoint: Checkpoint, path: str) -> None:
    """HEAD has the headers of GET and no body, and the connection goes on."""
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(LIVE.replace(b"GET /health/live", b"HEAD " + path.encode()))
        received = b""
        while not received.endswith(b"\r\n\r\n"):
            received += connection.recv(65536)
        headers = received.lower().split(b"\r\n")
        assert headers[0] == b"http/1.1 200 ok"
        (length,) = [line for line in headers if line.startswith(b"content-length: ")]
        assert int(length.partition(b": ")[2]) > 0
        connection.sendall(LIVE)
        assert answer(connection)[1] == {"status": "live"}


def test_http_1_0_needs_no_host(default_checkpoint: Checkpoint) -> None:
    """A request of HTTP/1.0 without a Host header is answered."""
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(b"GET /health/live HTTP/1.0\r\n\r\n")
        assert answer(connection)[0].status == 200


@pytest.mark.parametrize("target", [b"/x", b"example.org:443"])
def test_connect_gets_one_answer(default_checkpoint: Checkpoint, target: bytes) -> None:
    """CONNECT is a 405 that names the methods, and the end of the connection."""
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(b"CONNECT " + target + b" HTTP/1.1\r\nHost: test\r\n\r\n" + LIVE)
        response, body = answer(connection)
        assert (response.status, body["code"]) == (405, "method_not_allowed")
        assert response.headers["allow"] == "GET, HEAD, POST"
        assert hung_up(connection)


@pytest.mark.parametrize("behind", [b"", head("Transfer-Encoding: chunked") + b"0\r\n"])
def test_many_headers(default_checkpoint: Checkpoint, behind: bytes) -> None:
    """128 headers (or trailers) are accepted; one more is a 431, and what follows is not read."""
    start, fields = behind or LIVE[:-2], 128 - (3 if behind else 1)
    with served(default_checkpoint) as service:
        with service.connect() as connection:
            connection.sendall(start + fields * b"a:\r\n" + b"\r\n")
            assert answer(connection)[0].status == (400 if behind else 200)
        with service.connect() as connection:
            connection.sendall(start + (fields + 1) * b"a:\r\n" + b"\r\n" + LIVE)
            response, body = answer(connection)
            assert (response.status, body["code"]) == (431, "headers_too_large")
            assert "128 headers" in body["detail"]
            assert hung_up(connection)


def test_a_long_url(default_checkpoint: Checkpoint) -> None:
    """A URL of 8,192 bytes is looked up, a longer one is refused without being decoded."""
    with served(default_checkpoint) as service, service.connect() as connection:
        for size, status, code in ((8192, 404, "not_found"), (8193, 431, "headers_too_large")):
            connection.sendall(LIVE.replace(b"/health/live", b"/" + (size - 1) * b"a"))
            response, body = answer(connection)
            assert (response.status, body["code"]) == (status, code)
        assert hung_up(connection)


def test_trailers_are_not_headers(default_checkpoint: Checkpoint) -> None:
    """A field behind a chunked body has no effect on how its request is read."""
    with served(default_checkpoint) as service, service.connect() as connection:
        body = json.dumps({"input": "a"}).encode()
        chunked = b"%x\r\n%s\r\n0\r\n" % (len(body), body)
        sent = head("Transfer-Encoding: chunked") + chunked + b"x-request-id: trailer\r\n\r\n"
        connection.sendall(sent)
        response, _ = answer(connection)
        assert response.status == 200
        assert response.headers["x-request-id"] != "trailer"


def test_small_chunks(default_checkpoint: Checkpoint) -> None:
    """A body with a chunk for each text and each comma is read; a megabyte of 1-byte chunks not."""
    pieces = [b'{"input": [', *[b'"a"', b","] * 2047, b'"a"', b"]}"]
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    start = head("Transfer-Encoding: chunked")
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(start + chunked + b"0\r\n\r\n")
        assert len(answer(connection)[1]["data"]) == 2048
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(start + 200_000 * b"1\r\na\r\n")
        response, body = answer(connection)
        assert (response.status, body["code"]) == (400, "invalid_request")
        assert "pieces" in body["detail"]
        assert hung_up(connection)


def test_a_malformed_chunk_waits_for_the_answer_before_it(default_checkpoint: Checkpoint) -> None:
    """The first of two pipelined requests is answered first, though the second is malformed."""
    with served(default_checkpoint, delay=0.3) as service, service.connect() as connection:
        connection.sendall(whole({"input": "a"}) + head("Transfer-Encoding: chunked"))
        wait_for(lambda: len(service.engine.batches) == 1)
        connection.sendall(b"no number\r\n")
        response, body = answer(connection)
        assert (response.status, len(body["data"])) == (200, 1)
        assert hung_up(connection)


def test_a_malformed_chunk_behind_an_answer(default_checkpoint: Checkpoint) -> None:
    """A request that was refused before its body was read gets no second answer."""
    sent = head("Transfer-Encoding: chunked").replace(b"application/json", b"text/plain")
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(sent)
        assert answer(connection)[0].status == 415
        connection.sendall(b"no number\r\n")
        assert hung_up(connection)


def test_line_breaks_do_not_keep_a_connection(default_checkpoint: Checkpoint) -> None:
    """An idle connection that sends nothing but CRLF is closed when its time is over."""
    with served(default_checkpoint, keep_alive=0.5) as service, service.connect() as connection:
        connection.sendall(LIVE)
        assert answer(connection)[0].status == 200
        began = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() < began + 5:
                connection.sendall(b"\r\n")
                time.sleep(0.1)
        assert time.monotonic() - began < 2


def test_a_head_begun_before_an_answer_is_timed(default_checkpoint: Checkpoint) -> None:
    """Half a request behind one that is being answered has the header timeout from then on."""
    with (
        served(default_checkpoint, delay=0.2, header_timeout=0.3) as service,
        service.connect() as connection,
    ):
        connection.sendall(whole({"input": "a"}) + LIVE[:20])
        assert answer(connection)[0].status == 200
        assert answer(connection)[1]["code"] == "header_timeout"
        assert hung_up(connection)


def test_noise_behind_a_request_does_not_spoil_its_answer(default_checkpoint: Checkpoint) -> None:
    """A whole request is answered even if no HTTP follows it; then the line is closed."""
    with served(default_checkpoint, delay=0.1) as service, service.connect() as connection:
        connection.sendall(whole({"input": "a"}) + b"\x00\x01noise")
        response, body = answer(connection)
        assert (response.status, len(body["data"])) == (200, 1)
        assert hung_up(connection)


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_an_offered_upgrade_is_passed_over(default_checkpoint: Checkpoint, protocol: str) -> None:
    """Clients that offer another protocol are answered in HTTP/1.1."""
    with served(default_checkpoint) as service, service.connect() as connection:
        request = whole({"input": "a"}).replace(
            b"Host: test", f"Host: test\r\nConnection: Upgrade\r\nUpgrade: {protocol}".encode()
        )
        for _ in range(2):
            connection.sendall(request)
            response, body = answer(connection)
            assert (response.status, len(body["data"])) == (200, 1)


def test_a_flood_of_pipelined_requests_is_cut(default_checkpoint: Checkpoint) -> None:
    """A few requests ahead of their answers are answered; thousands are not kept in memory."""
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(5000 * LIVE)
        received = b""
        with suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
        assert 1 <= received.count(b"HTTP/1.1 200 OK") <= 100
        assert received.count(b"HTTP/1.1") == received.count(b"HTTP/1.1 200 OK")


def test_new_connections_take_the_place_of_those_that_wait(default_checkpoint: Checkpoint) -> None:
    """At the limit, the connection that has waited longest for a request is closed."""
    with served(default_checkpoint, max_connections=4) as service, ExitStack() as stack:
        first, second, third, fourth, fifth = (
            stack.enter_context(service.connect()) for _ in range(5)
        )
        assert hung_up(first)
        second.sendall(LIVE)
        assert answer(second)[0].status == 200  # which makes it the last to have waited
        stack.enter_context(service.connect())
        assert hung_up(third)
        for connection in (second, fourth, fifth):
            connection.sendall(LIVE)
            assert answer(connection)[0].status == 200


def test_when_all_connections_are_busy(default_checkpoint: Checkpoint) -> None:
    """Nobody in work is cut off: further clients get 503, probes their answers."""
    with (
        served(default_checkpoint, delay=1.0, max_connections=2) as service,
        ExitStack() as stack,
    ):
        busy = [stack.enter_context(service.connect()) for _ in range(2)]
        for connection in busy:
            connection.sendall(whole({"input": "a"}))
        wait_for(lambda: len(service.engine.batches) == 2)
        url = f"http://127.0.0.1:{service.port}"
        refused = httpx.post(f"{url}{PATH}", json={"input": "a"})
        assert (refused.status_code, refused.json()["code"]) == (503, "too_many_connections")
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-request-id"] == refused.json()["request_id"]
        assert set(refused.json()) == FORM
        for probe in ("/health/live", "/health/ready", "/metrics"):
            assert httpx.get(url + probe).status_code == 200
        for connection in busy:
            assert answer(connection)[0].status == 200
        assert httpx.post(f"{url}{PATH}", json={"input": "a"}).status_code == 200


def test_an_answer_that_is_not_read(default_checkpoint: Checkpoint) -> None:
    """A client that asks for much and reads nothing is cut off, and its memory is free."""
    with (
        served(default_checkpoint, answer_timeout=0.5) as service,
        service.connect() as connection,
    ):
        content = whole({"input": ["a"] * 2048})
        for _ in range(3):
            connection.sendall(content)
        wait_for(lambda: service.connections() == 1)
        limit = time.monotonic() + 20
        while service.connections() > 0:
            assert time.monotonic() < limit
            time.sleep(0.05)
        assert service.sample("taskvec_requests_in_flight") == 0


def test_the_answer_of_a_refusal_is_json(default_checkpoint: Checkpoint) -> None:
    """Its declared length is its length, so that clients read it to its end."""
    with served(default_checkpoint) as service, service.connect() as connection:
        connection.sendall(b"nothing\r\n\r\n")
        received = b""
        while piece := connection.recv(65536):
            received += piece
    headers, _, body = received.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in headers.lower()
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
