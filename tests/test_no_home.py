"""A user without a home directory and without an entry in /etc/passwd, as in many containers.

Caches go to a private folder below the temporary one; what cannot be done ends with one sentence.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import free_port, wait_until
from privileges import UNKNOWN_USER, as_unknown_user
from processes import embed, served

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

CHECKED = (
    "import os, pathlib\ntry:\n    pathlib.Path.home()\nexcept RuntimeError:\n    print('none')"
)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """Return variables without HOME and caches, with a temporary folder for every user."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        unset = ("HOME", "XDG_", "HF_", "TASKVEC_", "TRITON_", "MPLCONFIGDIR", "USER", "LOGNAME")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
        variables = kept | {"TMPDIR": folder, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if run(variables, "-c", "import taskvec").returncode != 0:
            pytest.skip("other users cannot read this Python installation")
        yield variables


def test_the_user_of_these_tests_has_no_home(environment: dict[str, str]) -> None:
    """The processes below run as a user for whom Python knows no home directory."""
    assert run(environment, "-c", CHECKED).stdout == "none\n"


def test_commands_and_the_library_work(environment: dict[str, str]) -> None:
    """`taskvec embed` and the library load the built-in model, and say nothing."""
    program = "from taskvec import Embedder\nprint(Embedder().embed('a').shape)"
    done = run(environment, "-c", program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 256)\n", "")
    done = run(environment, "-m", "taskvec", "embed", stdin="a text")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["embedding"]) == 256


@pytest.mark.parametrize("program", ["check", "library"])
def test_a_hub_id_that_is_not_cached_is_one_sentence(
    environment: dict[str, str], program: str
) -> None:
    """The hub's cache is searched below the temporary folder, and the error says what to do."""
    if program == "check":
        done = run(environment, "-m", "taskvec", "check", "someone/tiny")
        assert done.returncode == 3
        (sentence,) = done.stderr.splitlines()
    else:
        done = run(environment, "-c", "from taskvec import Embedder\nEmbedder('someone/tiny')")
        sentence = done.stderr.splitlines()[-1]
    assert "someone/tiny is not in the local hub cache" in sentence


@pytest.mark.parametrize("options", [("--workers", "2"), ("--in-process",), ("remote",)], ids=str)
def test_a_service_serves(environment: dict[str, str], options: tuple[str, ...]) -> None:
    """Several gateways, and a gateway before engine servers, start without a home directory."""
    if options != ("remote",):
        assert_serves(environment, *options)
        return
    with served("--token-input", "accept", "--log-level", "error") as engine:
        assert_serves(environment, "--engine", "remote", "--engine-url", engine.url)
    golden = Path(environment["TMPDIR"]) / f"taskvec-{UNKNOWN_USER}" / ".cache/taskvec/golden"
    assert len(list(golden.iterdir())) == 1


def test_a_folder_of_another_user_is_not_used(environment: dict[str, str]) -> None:
    """A folder with the name of the private one that belongs to another user is refused."""
    folder = Path(environment["TMPDIR"]) / f"taskvec-{UNKNOWN_USER}"
    folder.mkdir(mode=0o777)
    url = f"http://127.0.0.1:{free_port()}"
    remote = ("--engine", "remote", "--engine-url", url, "--port", "0", "--log-level", "error")
    done = run(environment, "-m", "taskvec", "serve", *remote)
    assert done.returncode == 3
    (sentence,) = done.stderr.splitlines()
    assert f"User id {UNKNOWN_USER} has no home directory" in sentence
    assert str(folder) in sentence


def assert_serves(environment: dict[str, str], *options: str) -> None:
    """Start a server as the unknown user, send a request, and stop it."""
    port = free_port()
    command = as_unknown_user(
        sys.executable, "-m", "taskvec", "serve", "--port", str(port), "--log-level", "error",
        *options,
    )  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as process:
        try:
            wait_until(f"http://127.0.0.1:{port}/health/ready", process)
            answer = embed(f"http://127.0.0.1:{port}", {"input": "a"}).json()
            assert len(answer["data"][0]["embedding"]) == 256
        finally:
            process.terminate()
            errors = process.communicate(timeout=60)[1].decode()
    assert errors == ""


def run(
    environment: dict[str, str], *arguments: str, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run Python as the unknown user."""
    return subprocess.run(
        as_unknown_user(sys.executable, *arguments),
        input=stdin, capture_output=True, text=True, check=False, timeout=120, env=environment,
        cwd="/",
    )  # fmt: skip
