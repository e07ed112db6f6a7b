"""Runs the documentation's examples, and checks those that cannot run in another way."""

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

SECRET = re.compile(r"shown only once: (tv-\S+)")


class Reader:
    """Runs the commands of a page in a scratch folder, with the server that they use.

    Attributes:
        folder: working directory of the commands.
        python: interpreter for Python programs.
    """

    python = sys.executable

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".curlrc").write_text("fail-with-body\n")  # else curl exits with 0 for an error
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
        """Return the URL of the running server; start one with defaults if there is none."""
        if self._server is None:
            self.serve("taskvec serve")
        return f"http://127.0.0.1:{self._port}"

    def run(self, runner: list[str], text: str, location: str) -> str:
        """Run a command or program, assert success, and return its output."""
        if ":8080" in text:
            self.server()
        done = subprocess.run(
            [*runner, self._here(text)],
            cwd=self.folder,
            env=self._environment,
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
        """Start a command that serves, and stop the previous one."""
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
        """Return the text with addresses, the secret and the model replaced for this machine."""
        for there, here in {
            "127.0.0.1:8080": f"127.0.0.1:{self._port}",
            "localhost:8080": f"localhost:{self._port}",
            "--port 8080": f"--port {self._port}",
            "tv-...": self._secret,  # printed by `taskvec key` earlier on the page
            "jinaai/jina-embeddings-v5-text-small": "taskvec-mini",  # works without a hub
        }.items():
            text = text.replace(there, here)
        return text

    def _stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.communicate(timeout=60)
            self._server = None


class Substitute(NamedTuple):
    """Substitute for commands that cannot run in a test.

    Attributes:
        pattern: matches the commands.
        reason: why they cannot run.
        check: checks the command in another way.
    """

    pattern: re.Pattern[str]
    reason: str
    check: Callable[[Reader, str], object]


def substitute_of(command: str) -> Substitute | None:
    """Return the substitute for a command; None if the command can run."""
    return next(
        (substitute for substitute in SUBSTITUTES if substitute.pattern.match(command)), None
    )


def make_would_run(_: Reader, text: str) -> str:
    """Assert that a make target exists; return the last command that it would run."""
    words = shlex.split(text, comments=True)[1:]
    command = ["make", "--directory", str(ROOT), "--no-print-directory", "--dry-run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def make_serves(reader: Reader, text: str) -> None:
    """Run the serve command of a make target without installing packages first."""
    reader.serve(make_would_run(reader, text).replace(".venv/bin/", ""))


def helm_renders(_: Reader, text: str) -> None:
    """Assert that the chart renders with these options and that its path exists."""
    _, _, release, chart, *options = shlex.split(text, comments=True)
    assert (release, ROOT / chart) == (RELEASE, CHART)
    done = helm("template", *(option.replace(chart, str(CHART)) for option in options))
    assert done.returncode == 0, done.stderr


def helm_has_a_test(_: Reader, text: str) -> None:
    """Assert that the release has the installed name and that the chart has a test pod."""
    assert shlex.split(text) == ["helm", "test", RELEASE]
    assert "helm.sh/hook: test" in helm("template").stdout


def compose_has_it(_: Reader, text: str) -> None:
    """Assert that the compose file has the profiles and services."""
    words = shlex.split(text, comments=True)
    services = yaml.safe_load((ROOT / words[words.index("-f") + 1]).read_text())["services"]
    profiles = {name for service in services.values() for name in service.get("profiles", [])}
    assert {value for flag, value in pairwise(words) if flag == "--profile"} <= profiles
    wanted = words[words.index("up") + 1 :]
    assert {word for word in wanted if not word.startswith("-")} <= services.keys()


def image_is_built(_: Reader, text: str) -> None:
    """Assert that the image's tag is a target of the Dockerfile, as in `make images`."""
    (target,) = re.findall(r"\btaskvec:(\S+)", text)
    assert target in read_stages(ROOT / "Dockerfile")


def pip_has_it(_: Reader, text: str) -> None:
    """Assert that our extras are in pyproject.toml and that requirements files exist."""
    words = shlex.split(text, comments=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if word.startswith(project["name"]):
            assert Requirement(word).extras <= project["optional-dependencies"].keys()
    if "--requirement" in words:
        assert (ROOT / words[words.index("--requirement") + 1]).is_file()


def options_exist(_: Reader, text: str) -> None:
    """Assert that the command line parses the options."""
    words = shlex.split(text, comments=True)
    _, name, *options = words[words.index("taskvec") :]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands[name].make_context(name, options)


def _substitute(pattern: str, reason: str, check: Callable[[Reader, str], object]) -> Substitute:
    return Substitute(re.compile(pattern), reason, check)


SUBSTITUTES = [
    _substitute("make serve", "it installs packages first", make_serves),
    _substitute(
        "make (test|build|images|load|peers)",
        "it takes long, or needs Docker",
        make_would_run,
    ),
    _substitute(
        "helm (install|upgrade)", "there is no cluster; tests/deploy has more", helm_renders
    ),
    _substitute(
        "helm test", "there is no cluster; tests/deploy runs the pod's request", helm_has_a_test
    ),
    _substitute(".*docker compose", "there is no Docker; tests/deploy has more", compose_has_it),
    _substitute("docker run", "there is no Docker; tests/deploy starts it without", image_is_built),
    _substitute("pip (install|download)", "it needs an index", pip_has_it),
    _substitute("taskvec serve --engine vllm", "tests/real_vllm does, with vLLM", options_exist),
    _substitute("taskvec serve --engine remote", "test_remote_serving.py does", options_exist),
    _substitute("taskvec eval", "tests/evaluation does, with data of its own", options_exist),
    _substitute("TASKVEC_LIMITS_URL=", "tests/auth does, with a Redis", options_exist),
]
"""All commands in the documentation's shell blocks that are not run, and why."""
