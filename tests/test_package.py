"""The wheel contains everything that serving needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

import taskvec
from conftest import repository
from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint

SOURCES = ("service", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel with the installed build back-end, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = folder / "checkout"
    checkout.mkdir()
    # A copy, so that the build leaves nothing in the checkout.
    for name in SOURCES:
        source = repository() / name
        if source.is_dir():
            caches = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, checkout / name, ignore=caches)
        else:
            shutil.copy(source, checkout / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--no-index", "--quiet", "--wheel-dir", str(folder), str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel into a folder."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_has_the_default_model(installed: Path, default_checkpoint: Checkpoint) -> None:
    """The wheel contains the default model's files, byte for byte."""
    source = default_checkpoint.folder
    target = installed / "taskvec" / "default_model"
    packed = read_checkpoint(target, "taskvec-mini")
    assert packed.card == default_checkpoint.card
    assert len(packed.adapters) == 4
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    assert {Path("model.safetensors"), Path("tokenizer.json")} <= set(files)
    for file in files:
        assert (target / file).read_bytes() == (source / file).read_bytes(), file


def test_the_wheel_has_every_module(installed: Path) -> None:
    """The wheel contains all Python files of the package and py.typed."""
    source = Path(taskvec.__file__).parent
    modules = {str(file.relative_to(source)) for file in source.rglob("*.py")}
    packed = {str(file.relative_to(installed / "taskvec")) for file in installed.rglob("*.py")}
    assert packed == modules
    assert len(modules) > 30
    assert (installed / "taskvec" / "py.typed").is_file()


def test_the_wheel_has_nothing_else(wheel: Path) -> None:
    """The wheel contains only the package and its metadata: no tests, no caches."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {
        "taskvec",
        f"taskvec-{taskvec.__version__}.dist-info",
    }
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []


def test_the_metadata_is_right(installed: Path) -> None:
    """Version, licence and entry point equal those of the checkout."""
    folder = installed / f"taskvec-{taskvec.__version__}.dist-info"
    metadata = BytesParser().parsebytes((folder / "METADATA").read_bytes())
    assert metadata["Version"] == taskvec.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    licence = (repository() / "LICENSE").read_bytes()
    assert (folder / "licenses" / "LICENSE").read_bytes() == licence
    assert "taskvec = taskvec.cli.main:main" in (folder / "entry_points.txt").read_text()
    torch = [r for r in metadata.get_all("Requires-Dist") if r.startswith("torch")]
    assert torch
    assert all("extra ==" in requirement for requirement in torch), "a gateway needs no torch"


def test_the_wheel_serves_by_itself(installed: Path) -> None:
    """The unpacked wheel passes its self-test without the checkout."""
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); sys.argv[1:] = ['check']\n"
        "import taskvec.cli.main; taskvec.cli.main.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert str(installed / "taskvec" / "default_model") in done.stdout
    assert "self-test     passed" in done.stdout
