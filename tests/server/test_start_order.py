"""What makes a start impossible is found before the model is loaded."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import trustme

from conftest import free_port, wait_until
from privileges import unprivileged
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint

pytestmark = pytest.mark.full("failures, restarts and several processes of running servers")

MODES = {
    "engine process": [],
    "in process": ["--in-process"],
    "workers": ["--workers", "2"],
    "remote": ["--engine", "remote", "--engine-url", "http://127.0.0.1:1"],
    "remote workers": [
        "--engine", "remote", "--engine-url", "http://127.0.0.1:1", "--workers", "2",
    ],
    "tls": ["--tls-cert", "{pem}"],
}  # fmt: skip


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """Options of each way to serve."""
    pem = tmp_path / "server.pem"
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
    return [option.format(pem=pem) for option in MODES[request.param]]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another server listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_taken_port_is_found_first(mode: list[str], taken: int) -> None:
    """The message names host and port, and the model has not even been looked for."""
    done = serve("--model", "/no/such/model", "--port", str(taken), *mode)
    assert done.returncode == 3
    why = "cannot be bound, because it is in use: is another server running?"
    assert said(done) == f"taskvec: 127.0.0.1:{taken} {why}"


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("192.0.2.1", "0", "192.0.2.1:0 cannot be bound: "),
        ("no-such-host.invalid", "0", "the host 'no-such-host.invalid' has no address"),
    ],
)
def test_a_host_of_another_machine_is_found_first(
    mode: list[str], host: str, port: str, reason: str
) -> None:
    """An address that is not of this machine, or a name without one, is named."""
    done = serve("--model", "/no/such/model", "--host", host, "--port", port, *mode)
    assert done.returncode == 3
    assert reason in said(done)


@pytest.mark.parametrize(
    "option", [["--keys-file", "/no/such/keys"], ["--tls-cert", "/no/such/certificate"]], ids=str
)
def test_files_are_found_first(mode: list[str], option: list[str]) -> None:
    """Keys and a certificate that cannot be read are named before the model is looked for."""
    done = serve("--model", "/no/such/model", "--port", "0", *mode, *option)
    assert done.returncode == 3
    assert option[1] in said(done)


def test_a_privileged_port_is_a_lack_of_permission() -> None:
    """A port that needs a privilege is not reported as taken."""
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if first < 2:
        pytest.skip("every user may bind every port here")
    done = serve("--port", "1", start=unprivileged(sys.executable, "-m", "taskvec"))
    assert (done.returncode, said(done)) == (
        3,
        "taskvec: 127.0.0.1:1 cannot be bound: Permission denied.",
    )


@pytest.fixture
def slow(tmp_path: Path, default_checkpoint: Checkpoint) -> Path:
    """The default model with a config.json that is a pipe: reading it waits for a writer."""
    for file in default_checkpoint.folder.iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    os.mkfifo(tmp_path / "config.json")
    return tmp_path


def test_a_bound_port_refuses_until_the_model_is_found(slow: Path) -> None:
    """Connections are refused, instead of waiting, while the checkpoint is read."""
    with starting(slow) as (process, port):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        feed(slow)
        wait_until(f"http://127.0.0.1:{port}/health/live", process)


def test_another_server_may_be_faster(slow: Path) -> None:
    """If another process listens on the port meanwhile, the start fails without a traceback."""
    with starting(slow) as (process, port):
        with socket.create_server(("127.0.0.1", port)):
            feed(slow)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == 3
        assert b"cannot_listen" in errors
        assert b"address already in use" in errors.lower()
        assert b"Traceback" not in errors


@contextmanager
def starting(model: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start a server whose model is not found yet; yields when its port is bound."""
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--model", str(model), "--in-process"]
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            assert any(b"addresses_bound" in line for line in process.stderr)
            yield process, port
        finally:
            process.kill()


def feed(model: Path) -> None:
    """Write the config that the server waits for."""
    content = (open_checkpoint(DEFAULT_MODEL).folder / "config.json").read_bytes()
    (model / "config.json").write_bytes(content)


def serve(
    *options: str, start: Sequence[str] = (sys.executable, "-m", "taskvec")
) -> CompletedProcess[str]:
    """Run a server that cannot start."""
    command = [*start, "serve", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def said(done: CompletedProcess[str]) -> str:
    """Return the only sentence of a failed start."""
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("taskvec: ")]
    return line
