"""How the documentation's examples are run, and what stands in for those that cannot be."""

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

SECRET = re.compile(r"told this once: (tv-\S+)")


class Reader:
    """Follows a page, in a scratch folder, with the server that its commands talk to.

    Attributes:
        folder: where they run.
        python: the interpreter that programs run with.
    """

    python = sys.executable

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".curlrc").write_text("fail-with-body\n")  # or it takes an error for an answer
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
        """The address of the server that runs; of one with defaults where none was started."""
        if self._server is None:
            self.serve("taskvec serve")
        return f"http://127.0.0.1:{self._port}"

    def run(self, runner: list[str], text: str, place: str) -> str:
        """What a command or program prints; its end must be a good one."""
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
        assert done.returncode == 0, f"{place}: {text}\n{done.stdout}\n{done.stderr}"
        if made := SECRET.search(done.stderr):
            self._secret = made[1]
        return done.stdout

    def serve(self, text: str) -> None:
        """Run a command that serves, in place of the one before, until the next or the end."""
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
        """The text as it runs here: all that is changed of it."""
        for there, here in {
            "127.0.0.1:8080": f"127.0.0.1:{self._port}",
            "localhost:8080": f"localhost:{self._port}",
            "--port 8080": f"--port {self._port}",
            "tv-...": self._secret,  # that `taskvec key` told before
            "jinaai/jina-embeddings-v5-text-small": "taskvec-mini",  # no hub is asked
        }.items():
            text = text.replace(there, here)
        return text

    def _stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server.communicate(timeout=60)
            self._server = None


class Instead(NamedTuple):
    """What cannot run in a test.

    Attributes:
        begins: matches such commands.
        reason: why they cannot.
        check: looks at the same thing in another way.
    """

    begins: re.Pattern[str]
    reason: str
    check: Callable[[Reader, str], object]


def instead(command: str) -> Instead | None:
    """How a command is checked that cannot run; None for one that can."""
    return next((way for way in INSTEAD if way.begins.match(command)), None)


def make_would_run(_: Reader, text: str) -> str:
    """The target is there: the last command that it would run."""
    words = shlex.split(text, comments=True)[1:]
    command = ["make", "--directory", str(ROOT), "--no-print-directory", "--dry-run", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def make_serves(reader: Reader, text: str) -> None:
    """What make would run in the end, in an environment that is installed already, serves."""
    reader.serve(make_would_run(reader, text).replace(".venv/bin/", ""))


def helm_renders(_: Reader, text: str) -> None:
    """The chart takes these values, and the paths are those of the repository."""
    _, _, release, chart, *options = shlex.split(text, comments=True)
    assert (release, ROOT / chart) == (RELEASE, CHART)
    done = helm("template", *(option.replace(chart, str(CHART)) for option in options))
    assert done.returncode == 0, done.stderr


def helm_has_a_test(_: Reader, text: str) -> None:
    """The release is the one that was installed, and its chart has a test pod."""
    assert shlex.split(text) == ["helm", "test", RELEASE]
    assert "helm.sh/hook: test" in helm("template").stdout


def compose_has_it(_: Reader, text: str) -> None:
    """The file, the profiles and the services are there."""
    words = shlex.split(text, comments=True)
    services = yaml.safe_load((ROOT / words[words.index("-f") + 1]).read_text())["services"]
    profiles = {name for service in services.values() for name in service.get("profiles", [])}
    assert {value for flag, value in pairwise(words) if flag == "--profile"} <= profiles
    wanted = words[words.index("up") + 1 :]
    assert {word for word in wanted if not word.startswith("-")} <= services.keys()


def image_is_built(_: Reader, text: str) -> None:
    """The image's tag is a target of the Dockerfile, as `make images` names them."""
    (target,) = re.findall(r"\btaskvec:(\S+)", text)
    assert target in read_stages(ROOT / "Dockerfile")


def pip_has_it(_: Reader, text: str) -> None:
    """Extras of ours are in pyproject.toml, files of requirements are there."""
    words = shlex.split(text, comments=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words:
        if word.startswith((project["name"], ".[")):
            word = word.replace(".[", f"{project['name']}[")  # noqa: PLW2901 - the clone itself
            assert Requirement(word).extras <= project["optional-dependencies"].keys()
    if "--requirement" in words:
        assert (ROOT / words[words.index("--requirement") + 1]).is_file()


def options_exist(_: Reader, text: str) -> None:
    """The command line understands it."""
    words = shlex.split(text, comments=True)
    _, name, *options = words[words.index("taskvec") :]
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    commands[name].make_context(name, options)


def _way(begins: str, reason: str, check: Callable[[Reader, str], object]) -> Instead:
    return Instead(re.compile(begins), reason, check)


INSTEAD = [
    _way("make serve", "it installs packages first", make_serves),
    _way(
        "make (test|build|images|load|peers)",
        "it takes long, or needs Docker",
        make_would_run,
    ),
    _way("helm (install|upgrade)", "there is no cluster; tests/deploy has more", helm_renders),
    _way("helm test", "there is no cluster; tests/deploy asks what the pod asks", helm_has_a_test),
    _way(".*docker compose", "there is no Docker; tests/deploy has more", compose_has_it),
    _way("docker run", "there is no Docker; tests/deploy starts it without", image_is_built),
    _way("pip (install|download)", "it needs an index", pip_has_it),
    _way("taskvec serve --engine vllm", "tests/real_vllm does, with vLLM", options_exist),
    _way("taskvec serve --engine remote", "test_remote_serving.py does", options_exist),
    _way("taskvec eval", "tests/evaluation does, with data of its own", options_exist),
    _way("TASKVEC_LIMITS_URL=", "tests/auth does, with a Redis", options_exist),
]
"""Everything in the documentation's shell blocks that is not run, and why."""
