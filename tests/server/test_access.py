"""Keys, limits and TLS of real processes."""

from __future__ import annotations

import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import trustme

from keyfiles import entry, running_redis
from processes import EXACT, Served, ended, served, started, total, wait_for
from taskvec.file_watch import RELOAD_INTERVAL

SECRET = "tv-s3cret-of-the-tests"  # noqa: S105 - it opens only the servers of this file
WEB = {"authorization": f"Bearer {SECRET}"}
TEXT = {"input": "a text", "task": "clustering"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers keep what they compute once in a folder of the tests, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TASKVEC_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file with the key web."""
    file = tmp_path / "keys.toml"
    file.write_text(entry("web", SECRET))
    return file


def asked(url: str, headers: dict[str, str] | None = None) -> httpx.Response:
    """The answer to an embedding request on a connection of its own."""
    return httpx.post(f"{url}/v1/embeddings", json=TEXT, headers=headers, timeout=60)


def test_a_pool_reaches_servers_with_keys(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TASKVEC_ENGINE_API_KEY opens a taskvec server with keys to a gateway, which asks for none."""
    with served("--keys-file", str(keys), "--token-input", "accept", *EXACT) as server:
        assert asked(server.url).status_code == 401
        remote = ("--engine", "remote", "--engine-url", server.url, "--log-level", "warning")
        monkeypatch.setenv("TASKVEC_ENGINE_API_KEY", SECRET)
        with served(*remote) as gateway:
            mine, theirs = asked(gateway.url), asked(server.url, WEB)
            vectors = [np.array(a.json()["data"][0]["embedding"]) for a in (mine, theirs)]
            assert np.abs(np.subtract(*vectors)).max() <= 1e-5
        monkeypatch.setenv("TASKVEC_ENGINE_API_KEY", "wrong")
        monkeypatch.setenv("TASKVEC_API_KEYS", "operator=tv-operator")
        with served(*remote, probe="live") as shut:
            ready = f"{shut.url}/health/ready"
            operator = {"api-key": "tv-operator"}
            wait_for(lambda: "401" in httpx.get(ready, headers=operator).json()["detail"])
            reason = httpx.get(ready, headers=operator).json()["detail"]
            assert "TASKVEC_ENGINE_API_KEY" in reason
            assert server.url in reason
            assert server.url not in httpx.get(ready).text
            shut.process.terminate()
            errors = ended(shut)[1]
        assert "wrong" not in errors


def test_gateways_ask_for_keys_and_share_limits(keys: Path) -> None:
    """Two gateways over one Redis: a key's limit holds for both, their engine asks for no key."""
    keys.write_text(entry("web", SECRET, requests_per_minute=10))
    with running_redis() as redis:
        options = ("--workers", "2", "--keys-file", str(keys), "--limits-url", redis.url)
        with served(*options, *EXACT) as server:
            assert {asked(server.url).status_code for _ in range(5)} == {401}
            statuses = [asked(server.url, WEB).status_code for _ in range(20)]
            assert sorted(statuses) == [200] * 10 + [429] * 10
            shown = httpx.get(f"{server.url}/metrics").text
            assert total(shown, "taskvec_key_requests_total", 'key="web",status="200"') == 10
            assert total(shown, "taskvec_key_requests_total", 'key="web",status="429"') == 10
            assert total(shown, "taskvec_key_requests_total", 'key="none",status="401"') == 5
            assert total(shown, "taskvec_limits_unchecked_total") == 0


def test_a_new_key_counts_without_a_restart(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`taskvec key` makes an entry; in the file it counts within seconds, beside the variable's."""
    monkeypatch.setenv("TASKVEC_API_KEYS", "env=tv-from-the-environment")
    with served("--keys-file", str(keys)) as server:
        command = [sys.executable, "-m", "taskvec", "key", "new"]
        made = subprocess.run(command, capture_output=True, check=True, text=True)
        (secret,) = [word for word in made.stderr.split() if word.startswith("tv-")]
        assert len(secret) > 40
        assert secret not in made.stdout
        fresh = {"api-key": secret}
        assert asked(server.url, fresh).status_code == 401
        new = keys.with_name("new.toml")
        new.write_text(made.stdout)
        new.rename(keys)
        wait_for(lambda: asked(server.url, fresh).status_code == 200)
        assert asked(server.url, WEB).status_code == 401
        assert asked(server.url, {"x-api-key": "tv-from-the-environment"}).status_code == 200
        keys.write_text("[[keys]]\nname = 'half'")
        shown = httpx.get(f"{server.url}/metrics").text
        assert total(shown, "taskvec_key_requests_total", 'key="new",status="200"') >= 1
        time.sleep(2.5 * RELOAD_INTERVAL)
        assert asked(server.url, fresh).status_code == 200
        server.process.terminate()
        errors = ended(server)[1]
    assert errors.count("keys_not_reloaded") == 1
    assert "entry 1: sha256" in errors
    for hidden in (secret, SECRET, "tv-from-the-environment"):
        assert hidden not in errors


def test_names_are_checked_before_a_key_is_made() -> None:
    """A name that no file may have is refused with exit code 2, and nothing is printed."""
    for name in ("none", "two words", "", "é", "a=b"):
        made = subprocess.run(
            [sys.executable, "-m", "taskvec", "key", name], capture_output=True, check=False
        )
        assert (made.returncode, made.stdout) == (2, b"")
        assert b"tv-" not in made.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_keys_end_the_start(keys: Path, workers: str) -> None:
    """A bad keys file, or a bad certificate: exit code 3 and one sentence that names it."""
    keys.write_text(entry("web", SECRET) + "[[keys]]\nname = 'half'\n")
    for options, named in (
        (("--keys-file", str(keys)), "entry 2: sha256"),
        (("--keys-file", "/no/such/file"), "/no/such/file"),
        (("--tls-cert", str(keys)), str(keys)),
        (("--tls-cert", "/no/such/cert"), "/no/such/cert"),
    ):
        code, errors = ended(Served("--workers", workers, "--log-level", "error", *options))
        assert code == 3, errors
        (sentence,) = errors.splitlines()
        assert sentence.startswith("taskvec: ")
        assert named in sentence


@pytest.mark.parametrize("workers", ["1", "2"])
def test_tls_is_spoken(tmp_path: Path, workers: str) -> None:
    """A client that trusts the authority shakes hands; one that does not, and plain HTTP, fail."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.cert_chain_pems[0].write_to_path(chain)
    certificate.private_key_pem.write_to_path(key)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    options = ("--tls-cert", str(chain), "--tls-key", str(key), "--workers", workers)
    with started(*options, *EXACT) as server, httpx.Client(verify=trusting, timeout=60) as client:
        url = f"https://127.0.0.1:{server.port}"
        wait_for(lambda: ready(client, url), seconds=60)
        assert client.post(f"{url}/v1/embeddings", json=TEXT).status_code == 200
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/health/live")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{server.port}/health/live")


def ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/health/ready").status_code == 200
    except httpx.TransportError:
        return False
