"""The page at / and the one at /docs: their files, what they may load, keys and the switch."""

from __future__ import annotations

import re
import socket
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from posixpath import normpath

import httpx
import pytest
from starlette.requests import Request

from cgroups import MB
from conftest import fake_service
from keyfiles import entry
from sockets import answer as answer_on
from sockets import served, wait_for
from taskvec.api.openapi import FOLDER as DOCS_FOLDER
from taskvec.api.static_files import static_handler
from taskvec.api.ui import FILES, FOLDER
from taskvec.checkpoint.checkpoint import Checkpoint

WEB = {"authorization": "Bearer s3cret"}
NAMESPACE = "http://www.w3.org/2000/svg"
PAGES = ["/", "/docs", "/docs/"]
REFERENCE = re.compile(
    r"""(?:src|href)="(?!\#|data:)([^"]+)"|\burl\(([^)]+)\)|(?:from|import) "([^"]+)";"""
)
"""What HTML, CSS and JavaScript load or link to."""


def references(text: str) -> list[str]:
    """The relative addresses in a file of a page."""
    return [next(filter(None, groups)) for groups in REFERENCE.findall(text)]


def joined(path: str, reference: str) -> str:
    """The path that a browser asks for."""
    return normpath(path.rpartition("/")[0] + "/" + reference)


async def all_files(client: httpx.AsyncClient, page: str) -> dict[str, httpx.Response]:
    """The page and all that can be reached from it, by path."""
    found: dict[str, httpx.Response] = {}
    new = {page}
    while new:
        path = new.pop()
        found[path] = await client.get(path)
        text = found[path].text
        if "bundle" not in path and "swagger" not in path:  # of others, and without references
            new |= {joined(path, each) for each in references(text)} - found.keys()
    return found


@pytest.mark.anyio
@pytest.mark.parametrize("page", PAGES)
async def test_every_file_that_a_page_refers_to_is_served(
    default_checkpoint: Checkpoint, page: str
) -> None:
    """All that a page loads or links to is there, with the type that its name says."""
    async with fake_service(default_checkpoint) as (client, _):
        files = await all_files(client, page)
    assert {path for path, answer in files.items() if answer.status_code != 200} == set()
    assert len(files) >= (17 if page == "/" else 6)
    types = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    for path, answer in files.items():
        expected = types.get(path.rpartition(".")[2])
        if expected:
            assert answer.headers["content-type"].startswith(expected)
    assert files[page].headers["content-type"] == "text/html; charset=utf-8"
    if page == "/":
        assert {f"/ui/{name}" for name in FILES} <= files.keys()
    else:
        assert len(files["/docs/files/swagger-ui-bundle.js"].content) > 1_000_000


def test_every_file_of_the_folder_is_listed() -> None:
    """What is in the folder is served, and nothing more is listed."""
    here = {file.name for file in FOLDER.iterdir() if file.is_file()}
    assert here == {*FILES, "index.html"}
    assert {file.name for file in DOCS_FOLDER.iterdir()} == {"docs.html", "docs.css", "docs.js"}


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.*")), ids=lambda file: file.name)
def test_no_file_names_another_host(file: Path) -> None:
    """Our files have no address of another host, and nothing that the policy would block."""
    text = file.read_text().replace(NAMESPACE, "")
    assert not re.search(r"(?i)(?:https?:)?//[\w.-]+\.\w{2,}/|https?://", text)
    for blocked in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert blocked not in text
    if file.suffix == ".html":
        assert not re.search(r"""<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)""", text)


@pytest.mark.anyio
@pytest.mark.parametrize("page", PAGES)
async def test_the_policy_of_a_page_is_strict(default_checkpoint: Checkpoint, page: str) -> None:
    """Scripts, styles and requests are of this origin only; other pages cannot embed the page."""
    async with fake_service(default_checkpoint) as (client, _):
        for path in (page, "/ui/app.js", "/docs/files/docs.js"):
            headers = (await client.get(path)).headers
            policy = dict(
                part.split(" ", 1) for part in headers["content-security-policy"].split("; ")
            )
            assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
            assert policy["form-action"] == policy["base-uri"] == "'none'"
            assert {policy[f"{kind}-src"] for kind in ("script", "style", "connect")} == {"'self'"}
            assert "unsafe" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.anyio
@pytest.mark.parametrize("path", [*PAGES, "/ui/app.css", "/docs/files/swagger-ui.css"])
async def test_head_and_etag(default_checkpoint: Checkpoint, path: str) -> None:
    """HEAD is answered as GET, without the body; a known ETag is a 304 with the same headers."""
    async with fake_service(default_checkpoint) as (client, _):
        answer = await client.get(path)
        head = await client.head(path)
        assert head.status_code == 200
        assert head.headers["content-length"] == str(len(answer.content))
        assert head.headers["etag"] == answer.headers["etag"]
        tag = answer.headers["etag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = await client.get(path, headers={"if-none-match": known})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == tag
            assert "content-security-policy" in again.headers
        other = await client.get(path, headers={"if-none-match": '"other"'})
        assert other.content == answer.content
        assert answer.headers["cache-control"] == "no-cache"


@pytest.mark.anyio
async def test_a_file_is_read_once_when_it_is_requested() -> None:
    """Making the route reads nothing; the second request is answered from memory."""
    reads = []

    def read() -> bytes:
        reads.append(1)
        return b"content"

    handler = static_handler("a.css", read, "default-src 'none'")
    assert not reads
    for _ in range(3):
        scope = {"type": "http", "method": "GET", "headers": []}
        assert (await handler(Request(scope))).body == b"content"
    assert len(reads) == 1


@pytest.mark.parametrize("reads", [True, False])
def test_unread_files_are_held(default_checkpoint: Checkpoint, reads: bool) -> None:
    """A file counts against a client's share of memory until it is read, or the client left."""
    file, held = "/docs/files/swagger-ui-bundle.js", "taskvec_memory_held_bytes"
    with served(default_checkpoint, memory_budget=4 * MB) as server, ExitStack() as stack:

        def ask(path: str, times: int = 1) -> socket.socket:
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(20)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode() * times)
            return connection

        size = len(httpx.get(f"http://127.0.0.1:{server.port}{file}").content)
        slow = ask(file, times=3)  # the kernel takes the first one
        wait_for(lambda: server.sample(held) > MB // 4)
        refused, body = answer_on(ask(file))
        assert (refused.status, body["code"]) == (429, "queue_full")
        with HTTPResponse(ask("/docs/files/docs.js")) as small:
            small.begin()
            assert small.status == 200
        if reads:
            left = 2 * size
            while left > 0:
                left -= len(slow.recv(MB))
        else:
            slow.close()
        wait_for(lambda: server.sample(held) == 0)


@pytest.mark.anyio
async def test_pages_are_open_and_their_requests_are_not(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """With keys the pages' files, which hold no secret, are open; all that they ask for is not."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("web", "s3cret"))
    settings = {"keys_file": file, "metrics_without_key": False, "served_model_name": "our-model"}
    async with fake_service(default_checkpoint, **settings) as (client, _):
        for page in ("/", "/docs"):
            files = await all_files(client, page)
            closed = {path for path, answer in files.items() if answer.status_code == 401}
            assert closed == {"/openapi.json"}
            assert not [path for path, answer in files.items() if "our-model" in answer.text]
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert (await client.get(path)).status_code == 401
            assert (await client.get(path, headers=WEB)).status_code == 200
        assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 401


@pytest.mark.anyio
@pytest.mark.parametrize("dialects", ["openai,tei", "openai"])
async def test_the_page_can_be_switched_off(default_checkpoint: Checkpoint, dialects: str) -> None:
    """Without the page, GET / is refused as before, and POST / is what it was; /docs stays."""
    async with fake_service(default_checkpoint, ui=False, dialects=dialects) as (client, _):
        answer = await client.get("/")
        assert answer.status_code == (405 if "tei" in dialects else 404)
        assert answer.headers.get("allow") == ("POST" if "tei" in dialects else None)
        assert (await client.get("/ui/app.js")).status_code == 404
        assert (await client.get("/docs")).status_code == 200
        embedded = await client.post("/", json={"inputs": "a"})
        assert embedded.status_code == (200 if "tei" in dialects else 404)


@pytest.mark.anyio
async def test_the_page_and_the_dialect_share_the_root(default_checkpoint: Checkpoint) -> None:
    """GET / is the page and POST / embeds; another method is told of both, in the API's form."""
    async with fake_service(default_checkpoint) as (client, _):
        assert (await client.get("/")).headers["content-type"].startswith("text/html")
        assert (await client.post("/", json={"inputs": "a"})).status_code == 200
        for method in ("PUT", "DELETE"):
            answer = await client.request(method, "/")
            assert answer.status_code == 405
            assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}
            assert set(answer.json()) == {"error", "error_type"}
    async with fake_service(default_checkpoint, dialects="openai") as (client, _):
        answer = await client.post("/", json={"inputs": "a"})
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.anyio
async def test_pages_are_no_part_of_the_api(default_checkpoint: Checkpoint) -> None:
    """The OpenAPI document has neither the pages nor their files; an unknown file is a 404."""
    async with fake_service(default_checkpoint) as (client, _):
        paths = (await client.get("/openapi.json")).json()["paths"]
        assert set(paths["/"]) == {"post"}
        assert not [path for path in paths if path.startswith(("/ui", "/docs"))]
        for path in (
            "/ui/other.js",
            "/ui/../settings.py",
            "/ui",
            "/docs/files/docs.html",
            "/redoc",
        ):
            answer = await client.get(path)
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
