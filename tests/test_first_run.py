"""The first command in a clone: what it says where it cannot install, and what it leaves."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest

from conftest import free_port, repository
from privileges import unprivileged
from programs import program

pytestmark = pytest.mark.full("the first command on machines where it fails")

TOOLS = ("sh", "make", "grep", "head", "ls", "mkdir", "mktemp", "rm", "sed", "tail", "touch")
"""Programs that every machine with make has."""

BIG = 64 << 20
"""Bytes of the package `big`, which do not fit on the small disk."""


class Checkout:
    """A copy of what the first command uses, with other packages in requirements/serve.txt."""

    def __init__(self, folder: Path, index: Path) -> None:
        """Copy; packages come from the folder ``index`` alone."""
        self.folder = folder
        self.environment = folder / ".venv"
        (folder / "service" / "taskvec").mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "service/taskvec/__init__.py"):
            shutil.copy(repository() / name, folder / name)
        shutil.copytree(repository() / "requirements", folder / "requirements")
        self.require("small==1.0")
        self._settings = {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": index.as_uri(),
            "PIP_NO_CACHE_DIR": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHON": sys.executable,
            "WHEEL": str(build_wheel(index, "taskvec", COMMAND)),
        }

    def require(self, *requirements: str) -> None:
        """Write the list of packages to install."""
        (self.folder / "requirements" / "serve.txt").write_text("\n".join(requirements))

    def command(self, *words: str, **variables: str | None) -> tuple[list[str], dict[str, str]]:
        """Return the command, and its environment with these variables; None removes one."""
        ours = ("PIP_", "MAKE", "PYTHON", "TASKVEC_", "VENV", "VIRTUAL_ENV")
        inherited = {name: v for name, v in os.environ.items() if not name.startswith(ours)}
        given = inherited | self._settings | variables
        return ["make", *words], {name: value for name, value in given.items() if value is not None}

    def make(
        self, *words: str, before: tuple[str, ...] = (), **variables: str | None
    ) -> subprocess.CompletedProcess[str]:
        """Run make in the checkout."""
        command, environment = self.command(*words, **variables)
        return subprocess.run(
            [*before, *command],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def refuses(self, *words: str, before: tuple[str, ...] = (), **variables: str | None) -> str:
        """Run make, which must fail; return its sentence, the only thing that it says."""
        done = self.make(*words, before=before, **variables)
        assert done.returncode == 2, done.stdout
        sentence, last = done.stderr.splitlines()
        assert last.startswith("make: ***")
        assert sentence.count(". ") == 0
        return sentence


COMMAND = {
    "taskvec/__init__.py": "import sys\n\ndef main():\n    print('runs', *sys.argv[1:])\n",
    "taskvec-1.0.dist-info/entry_points.txt": "[console_scripts]\ntaskvec = taskvec:main\n",
}


def build_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    """Write a wheel, version 1.0."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    about = f"{name}-1.0.dist-info"
    files = files | {
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{file},,\n" for file in [*files, f"{about}/RECORD"])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, text in (files | {f"{about}/RECORD": record}).items():
            archive.writestr(file, text)
    return path


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two wheels, and a package that has only its sources."""
    folder = tmp_path_factory.mktemp("index")
    build_wheel(folder, "small", {"small.py": ""})
    build_wheel(folder, "big", {"big.py": "#" * BIG})
    with tarfile.open(folder / "sources-1.0.tar.gz", "w:gz") as archive:
        for name, text in {"PKG-INFO": b"Name: sources\nVersion: 1.0\n", "setup.py": b""}.items():
            entry = tarfile.TarInfo(f"sources-1.0/{name}")
            entry.size = len(text)
            archive.addfile(entry, BytesIO(text))
    return folder


@pytest.fixture
def checkout(tmp_path: Path, index: Path) -> Checkout:
    """A checkout in a path with spaces, brackets and other letters than those of ASCII."""
    folder = tmp_path / "tâche n° 1 (copie)"
    folder.mkdir()
    return Checkout(folder, index)


def program_that(folder: Path, *lines: str) -> str:
    """Write an executable script of the shell."""
    folder.mkdir(exist_ok=True)
    path = folder / "python3"
    path.write_text("\n".join(["#!/bin/sh", *lines]))
    path.chmod(0o755)
    return str(path)


def test_it_installs_and_serves(checkout: Checkout) -> None:
    """The command is installed and run, in any path; a second time, nothing is installed."""
    done = checkout.make("serve", "PORT=8093")
    assert done.returncode == 0, done.stderr
    assert "Install requirements/serve.txt into .venv" in done.stdout
    assert "runs serve --port 8093 --model taskvec-mini" in done.stdout
    assert done.stderr == ""
    assert not (checkout.environment / "unfinished").exists()
    assert "Install" not in checkout.make("serve").stdout


def test_python_is_too_old(checkout: Checkout, tmp_path: Path) -> None:
    """The sentence names the version that is there, and how to name another Python."""
    pretend = "import sys; sys.version_info = (3, 10, 13, 'final', 0); exec(sys.argv[-1])"
    old = f'exec {shlex.quote(sys.executable)} -c {shlex.quote(pretend)} "$2"'
    program_that(tmp_path / "bin", old)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    sentence = checkout.refuses("test", PATH=path, PYTHON=None)
    assert "taskvec needs Python 3.11 or newer, and python3 is Python 3.10" in sentence
    assert sentence.endswith("make test PYTHON=python3.12")
    assert not checkout.environment.exists()


def test_python_is_missing(checkout: Checkout, tmp_path: Path) -> None:
    """Without any Python, the sentence says that it is missing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        (folder / name).symlink_to(program(name))
    sentence = checkout.refuses("serve", PATH=str(folder), PYTHON=None)
    assert "taskvec needs Python 3.11 or newer, and python3 does not run" in sentence
    assert not checkout.environment.exists()


def test_python_cannot_make_environments(checkout: Checkout, tmp_path: Path) -> None:
    """Debian's python3 without python3-venv: the sentence names the package."""
    (tmp_path / "ensurepip.py").write_text("raise ModuleNotFoundError('ensurepip')")
    sentence = checkout.refuses("serve", PYTHONPATH=str(tmp_path))
    assert "has no modules venv and ensurepip" in sentence
    assert f"apt-get install python3.{sys.version_info.minor}-venv" in sentence
    assert not checkout.environment.exists()


def test_there_is_no_network(checkout: Checkout) -> None:
    """The sentence names the index that cannot be reached; the next run begins again."""
    address = f"http://127.0.0.1:{free_port()}/simple"
    offline = {"PIP_NO_INDEX": None, "PIP_INDEX_URL": address, "PIP_FIND_LINKS": None}
    sentence = checkout.refuses("serve", **offline, PIP_RETRIES="0")
    assert "The package index on 127.0.0.1 cannot be reached: connect to the network" in sentence
    assert not checkout.environment.exists()
    assert checkout.make("serve").returncode == 0


def test_a_working_environment_outlives_the_network(checkout: Checkout) -> None:
    """An update that cannot be downloaded leaves the installed service as it is."""
    assert checkout.make("serve").returncode == 0
    checkout.require("small==1.0", "newer==1.0")
    address = f"http://127.0.0.1:{free_port()}/simple"
    for _ in range(2):
        offline = {"PIP_NO_INDEX": None, "PIP_INDEX_URL": address, "PIP_RETRIES": "0"}
        assert "cannot be reached" in checkout.refuses("serve", **offline)
        command = [checkout.environment / "bin" / "python", "-I", "-c", "import small, taskvec"]
        subprocess.run(command, check=True)


def test_nothing_is_compiled(checkout: Checkout) -> None:
    """A package without a build for this machine is named; no compiler is looked for."""
    checkout.require("sources==1.0")
    sentence = checkout.refuses("serve")
    assert "The package index has no sources==1.0 for Python 3." in sentence
    assert sentence.endswith("another Python: rm -rf .venv; make serve PYTHON=python3.12")
    assert not checkout.environment.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize(("megabytes", "package"), [(1, "small"), (48, "big")])
def test_the_disk_is_full(checkout: Checkout, megabytes: int, package: str) -> None:
    """While the environment is made or filled, the sentence says so; the space is given back."""
    checkout.require(f"{package}==1.0")
    disk = checkout.folder / "disk"
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o size={megabytes}m none disk && "$@"; code=$?; ls -A disk; exit $code'
    )
    before = (program("unshare"), "--mount", "sh", "-c", script, "sh")
    done = checkout.make("serve", "VENV=disk/.venv", before=before)
    sentence, last = done.stderr.splitlines()
    assert "There is no space left on the disk" in sentence
    assert sentence.endswith("free some, then: make serve")
    assert last.startswith("make: ***")
    assert done.stdout == "Install requirements/serve.txt into disk/.venv\n"


def test_the_checkout_is_read_only(checkout: Checkout) -> None:
    """The sentence says to copy it."""
    checkout.folder.chmod(0o555)
    try:
        sentence = checkout.refuses("serve", before=tuple(unprivileged(program("env"))))
    finally:
        checkout.folder.chmod(0o755)
    assert f".venv cannot be made in {checkout.folder}" in sentence
    assert "copy taskvec to a folder that you may write to" in sentence


@pytest.mark.parametrize("name", ["precious", "pyvenv.cfg"])
def test_other_folders_are_not_replaced(checkout: Checkout, name: str) -> None:
    """A folder that is not a virtual environment stays as it is, and so does one without pip."""
    precious = checkout.folder / "data" / name
    precious.parent.mkdir()
    precious.touch()
    sentence = checkout.refuses("serve", "VENV=data")
    assert "data exists and is not a virtual environment" in sentence
    assert sentence.endswith("remove it, or name another folder: make serve VENV=.venv2")
    assert precious.exists()


def test_an_environment_of_an_old_python(checkout: Checkout) -> None:
    """The sentence says to remove it: with another Python, it would still be used."""
    assert checkout.make("serve").returncode == 0
    python = checkout.environment / "bin" / "python"
    python.unlink()
    old = program_that(checkout.folder / "bin", "[ $2 = pip ] || echo 3.10")
    python.symlink_to(old)
    (checkout.environment / "serve.stamp").unlink()
    sentence = checkout.refuses("serve", PYTHON="python3.12")
    assert ".venv has Python 3.10, and taskvec needs 3.11 or newer" in sentence
    assert sentence.endswith("rm -rf .venv; make serve PYTHON=python3.12")


@pytest.fixture
def hanging_index() -> Iterator[str]:
    """Address of an index that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/simple"


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_stopped_installation_begins_again(
    checkout: Checkout, hanging_index: str, by: signal.Signals
) -> None:
    """What it leaves is not taken for complete, even if nothing could be tidied up."""
    never = {"PIP_NO_INDEX": None, "PIP_INDEX_URL": hanging_index}
    command, environment = checkout.command("serve", **never, PIP_TIMEOUT="100")
    # Processes in the background of a script ignore SIGINT, and so do their children.
    heed = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)"
    heed += "; os.execvp(sys.argv[1], sys.argv[1:])"
    with subprocess.Popen(
        [sys.executable, "-c", heed, *command],
        cwd=checkout.folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        limit = time.monotonic() + 60
        while not list(checkout.environment.glob("bin/pip")) and time.monotonic() < limit:
            time.sleep(0.05)
        os.killpg(process.pid, by)
        _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    if by == signal.SIGINT:
        assert "The installation was stopped; to begin again: make serve" in said
        assert not checkout.environment.exists()
    else:
        assert (checkout.environment / "unfinished").exists()
        (checkout.environment / "bin" / "half").touch()
    assert checkout.make("serve").returncode == 0
    assert not (checkout.environment / "bin" / "half").exists()
