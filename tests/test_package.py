"""The wheel contains everything that serving needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

import taskvec
from conftest import repository
from taskvec.checkpoint.checkpoint import read_checkpoint

SOURCES = ("service", "training", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
PACKAGES = {"taskvec": "service/taskvec", "taskvec_train": "training/taskvec_train"}


@pytest.fixture(scope="module")
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel under test; or one that is built here as by `make build`, without a network."""
    given: Path | None = request.config.getoption("--wheel")
    if given is not None:
        return given
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
    run("hatchling", "build", "--target", "sdist", "--directory", str(folder), at=checkout)
    (sdist,) = folder.glob("*.tar.gz")
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    run("pip", "wheel", *offline, "--wheel-dir", str(folder), str(sdist), at=folder)
    (built,) = folder.glob("*.whl")
    return built


def run(*words: str, at: Path) -> None:
    """Run a module of Python, which must succeed, in a folder."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=at,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel into a folder."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_has_the_default_model(installed: Path) -> None:
    """The wheel contains the default model's files, byte for byte."""
    source = repository() / "service" / "taskvec" / "default_model"
    target = installed / "taskvec" / "default_model"
    assert len(read_checkpoint(target, "taskvec-mini").adapters) == 4
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    assert {Path("model.safetensors"), Path("tokenizer.json")} <= set(files)
    for file in files:
        assert (target / file).read_bytes() == (source / file).read_bytes(), file


def test_the_wheel_has_the_page(installed: Path) -> None:
    """The wheel contains the files of the page and of /docs, byte for byte."""
    source, target = repository() / "service" / "taskvec" / "ui", installed / "taskvec" / "ui"
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    assert {Path("index.html"), Path("app.js"), Path("docs/docs.html")} <= set(files)
    for file in files:
        assert (target / file).read_bytes() == (source / file).read_bytes(), file


def test_the_wheel_has_every_module(installed: Path) -> None:
    """The wheel contains all Python files of the packages, as in the checkout, and py.typed."""
    for name, folder in PACKAGES.items():
        source = repository() / folder
        modules = {file.relative_to(source): file.read_bytes() for file in source.rglob("*.py")}
        target = installed / name
        packed = {file.relative_to(target): file.read_bytes() for file in target.rglob("*.py")}
        assert packed == modules
        assert len(modules) > 20
    assert (installed / "taskvec" / "py.typed").is_file()


def test_the_wheel_has_nothing_else(wheel: Path) -> None:
    """The wheel contains only the packages and its metadata: no tests, no caches."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    about = f"taskvec-{taskvec.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {*PACKAGES, about}
    assert [name for name in names if "__pycache__" in name or name.endswith(".pyc")] == []


def test_another_package_than_the_wheel_is_not_tested(wheel: Path, tmp_path: Path) -> None:
    """With `--wheel`, no test runs unless the imported package is that wheel, file by file."""
    changed = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(changed, "w") as target:
        for name in source.namelist():
            last = b"\n# changed" if name == "taskvec/errors.py" else b""
            target.writestr(name, source.read(name) + last)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--wheel", str(changed), "--collect-only", __file__],
        cwd=repository(),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR, done.stdout
    assert re.search("would import taskvec from|errors.py is another one", done.stderr)


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
