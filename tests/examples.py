"""How tests run the examples of the documentation, or check those that cannot run."""

from __future__ import annotations

import os
import re
import shlex
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import typer
import yaml
from packaging.requirements import Requirement

from charts import CHART, RELEASE, helm
from conftest import free_port, wait_until
from dockerfile import read_stages
from pages import ROOT
from taskvec.cli.main import app

SECRET = re.compile(r"\b(tv-\S+)")
"""The secret in the output of `taskvec key`."""


class Reader:
    """Runs the commands of a page in a temporary folder, with the server that they call.

    Attributes:
        folder: working directory of the commands.
        python: interpreter of the Python examples.
    """

    python = sys.executable

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".curlrc").write_text(
            "fail-with-body\n"
        )  # so that curl fails on an error response
        self._port = free_port()
        self._secret = ""
        self._server: subprocess.Popen[bytes] | None = None
        self._environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CURL_HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "TASKVEC_LOG_LEVEL": "error",
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def server(self) -> str:
        """Return the address of the running server; start one with defaults if there is none."""
        if self._server is None:
            self.serve("taskvec serve")
        return f"http://127.0.0.1:{self._port}"

    def run(self, runner: list[str], text: str, location: str) -> str:
        """Run a command or program, which must succeed, and return its standard output."""
        if ":8080" in text:
            self.server()
        environment = self._environment
        if "InferenceClient" in text:  # offline, it would not call the server either
            environment = environment | {"HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            [*runner, self._here(text)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
        assert done.returncode == 0, f"{location}: {text}\n{done.stdout}\n{done.stderr}"
        if made := SECRET.search(done.stderr):
            self._secret = made[1]
        return done.stdout

    def serve(self, text: str) -> None:
        """Start a server, which replaces the previous one, until the next one or the end."""
        self._stop()
        self._port = free_port()
        command = ["bash", "-c", f"exec env {self._here(text)}"]
        self._server = subprocess.Popen(
            command,
            cwd=self.folder,
            env=self._environment | {"TASKVEC_PORT": str(self._port)},
            stderr=subprocess.PIPE,
        )
        if "--tls-cert" in text:
            url = f"https://localhost:{self._port}"
            trust = ssl.create_default_context(cafile=str(self.folder / "cert.pem"))
            wait_until(f"{url}/health/ready", self._server, verify=trust)
        else:
            wait_until(f"{self.server()}/health/ready", self._server)

    def _here(self, text: str) -> str:
        """Return the text with the addresses, secret and model of the test."""
        for there, here in {
            "127.0.0.1:8080": f"127.0.0.1:{self._port}",
            "localhost:8080": f"localhost:{self._port}",
            "--port 8080": f"--port {self._port}",
            "tv-...": self._secret,  # the last one that `taskvec key` printed
            "jinaai/jina-embeddings-v5-text-small": "taskvec-mini",  # without a download
        }.items():
            text = text.replace(there, here)
        return text

    def _stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.communicate(timeout=60)
            self._server = None


class Instead(NamedTuple):
    """Replacement for commands that cannot run in a test.

    Attributes:
        pattern: matches the start of such commands.
        reason: why they cannot run.
        check: tests the same thing in another way.
    """

    pattern: re.Pattern[str]
    reason: str
    check: Callable[[Reader, str], object]


def instead(command: str) -> Instead | None:
    """Return the replacement for a command; None if the command can run."""
    return next((one for one in INSTEAD if one.pattern.match(command)), None)


def make_would_run(_: Reader, text: str) -> str:
    """Check that the target exists, and return the last command that it would run."""
    words = shlex.split(text, comments=True)[1:]
    command = ["make", "--directory", str(ROOT), "--no-print-directory", "--dry-run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def make_serves(reader: Reader, text: str) -> None:
    """Run the last command of the target, which must start a server."""
    reader.serve(re.sub(r"^\S+/bin/", "", make_would_run(reader, text)))


def helm_renders(_: Reader, text: str) -> None:
    """Check that the chart renders with these values, from paths of the repository."""
    _, _, release, chart, *options = shlex.split(text, comments=True)
    assert (release, ROOT / chart) == (RELEASE, CHART)
    done = helm("template", *(option.replace(chart, str(CHART)) for option in options))
    assert done.returncode == 0, done.stderr


def helm_has_a_test(_: Reader, text: str) -> None:
    """Check that the release is the installed one, and that the chart has a test pod."""
    assert shlex.split(text) == ["helm", "test", RELEASE]
    assert "helm.sh/hook: test" in helm("template").stdout


def compose_has_it(_: Reader, text: str) -> None:
    """Check that the file, the profiles and the services exist."""
    words = shlex.split(text, comments=True)
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    profiles = {name for service in services.values() for name in service.get("profiles", [])}
    assert {value for flag, value in pairwise(words) if flag == "--profile"} <= profiles
    wanted = words[words.index("up") + 1 :]
    assert {word for word in wanted if not word.startswith("-")} <= services.keys()


def image_is_built(_: Reader, text: str) -> None:
    """Check that the image's tag is a target of the Dockerfile, as in `make images`."""
    (target,) = re.findall(r"\btaskvec:(\S+)", text)
    assert target in read_stages(ROOT / "Dockerfile")


def pip_has_it(_: Reader, text: str) -> None:
    """Check that extras are in pyproject.toml, and that requirements files exist."""
    words = shlex.split(text, comments=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if word.startswith((project["name"], ".[")):
            word = word.replace(".[", f"{project['name']}[")  # noqa: PLW2901 - the clone itself
            assert Requirement(word).extras <= project["optional-dependencies"].keys()
    if "--requirement" in words:
        assert (ROOT / words[words.index("--requirement") + 1]).is_file()


def options_exist(_: Reader, text: str) -> None:
    """Check that the command line accepts the options."""
    words = shlex.split(text, comments=True)
    _, name, *options = words[words.index("taskvec") :]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands[name].make_context(name, options)


def _instead(pattern: str, reason: str, check: Callable[[Reader, str], object]) -> Instead:
    return Instead(re.compile(pattern), reason, check)


INSTEAD = [
    _instead("make serve", "installs packages first", make_serves),
    _instead(
        "make (test|build|images|load|peers)",
        "takes long, or needs Docker",
        make_would_run,
    ),
    _instead(
        "helm (install|upgrade)", "needs a cluster; tests/deploy checks the chart", helm_renders
    ),
    _instead(
        "helm test", "needs a cluster; tests/deploy runs the script of the pod", helm_has_a_test
    ),
    _instead(".*docker compose", "needs Docker; tests/deploy checks the file", compose_has_it),
    _instead(
        "docker run", "needs Docker; tests/deploy starts the image without it", image_is_built
    ),
    _instead("pip (install|download)", "needs a package index", pip_has_it),
    _instead(
        "taskvec serve --engine vllm", "needs vLLM; covered by tests/real_vllm", options_exist
    ),
    _instead(
        "taskvec serve --engine remote",
        "needs engine servers; covered by test_remote_serving.py",
        options_exist,
    ),
    _instead("taskvec eval", "needs data; covered by tests/evaluation", options_exist),
    _instead("TASKVEC_LIMITS_URL=", "needs Redis; covered by tests/auth", options_exist),
]
"""All commands in shell blocks of the documentation that are not run, with the reason."""
