"""What this process may not read is reported as a permission, with the file and the user id."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import trustme

from privileges import UNKNOWN_USER, unprivileged
from synthetic import TINY_SMALL, write_checkpoint

SHAPE = replace(
    TINY_SMALL, vocabulary=27_173, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8,
    intermediate=24, rank=4,
)  # fmt: skip
PATHS = {
    "config": "config.json",
    "weights": "model.safetensors",
    "tokenizer": "tokenizer.json",
    "tokenizer config": "tokenizer_config.json",
    "prompts": "config_sentence_transformers.json",
    "modules": "modules.json",
    "pooling config": "1_Pooling/config.json",
    "pooling folder": "1_Pooling",
    "adapters": "adapters",
    "adapter": "adapters/clustering",
    "adapter config": "adapters/clustering/adapter_config.json",
    "adapter weights": "adapters/clustering/adapter_model.safetensors",
    "folder": ".",
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all files of Jina's layout."""
    folder = write_checkpoint(tmp_path_factory.mktemp("m") / "m", SHAPE, adapters=("clustering",))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "lasttoken"}')
    pooling = '{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}'
    (folder / "modules.json").write_text(f"[{pooling}]")
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the checkpoint; in the end it can be deleted."""
    folder = shutil.copytree(sound, tmp_path / "above" / "checkpoint")
    yield folder
    for path in (folder.parent, folder, folder / "adapters", folder / "1_Pooling"):
        path.chmod(0o700)


def run(*arguments: object, lines: str = "", **environment: str) -> CompletedProcess[str]:
    """Run a command of taskvec that may not read what its user has no permission for."""
    return subprocess.run(
        unprivileged(sys.executable, "-m", "taskvec", *map(str, arguments)),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ | environment,
        input=lines,
    )


def test_a_readable_checkpoint_passes(folder: Path) -> None:
    """The same commands accept a checkpoint that may be read."""
    done = run("check", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "passed: 1 adapters" in done.stdout


@pytest.mark.parametrize("kind", PATHS)
def test_a_denial_is_not_damage(folder: Path, kind: str) -> None:
    """The message names the file or folder, the user id, the owner and the mode, on one line."""
    path = folder / PATHS[kind]
    path.chmod(0o077)  # the permissions of others do not count for the owner
    assert_denied(run("check", folder), path)


def test_a_folder_that_may_only_be_entered(folder: Path) -> None:
    """A folder of adapters whose names may not be listed is named."""
    (folder / "adapters").chmod(0o177)
    assert_denied(run("check", folder), folder / "adapters", "0177")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_the_owner_is_named(folder: Path) -> None:
    """Weights of another user are reported with the id of that user."""
    weights = folder / "model.safetensors"
    weights.chmod(0o600)
    os.chown(weights, UNKNOWN_USER, UNKNOWN_USER)
    assert_denied(run("check", folder), weights, "0600", UNKNOWN_USER)


def test_a_folder_above_is_named(folder: Path) -> None:
    """The message names the folder above the checkpoint that may not be entered."""
    folder.parent.chmod(0o077)
    done = run("check", folder)
    assert_denied(done, folder)
    assert f"the folder {folder.parent} belongs" in done.stderr


@pytest.mark.parametrize("command", ["serve", "embed", "engine-args"])
def test_all_commands_say_so(folder: Path, command: str) -> None:
    """Every command that reads a checkpoint reports the denial alike."""
    (folder / "model.safetensors").chmod(0o077)
    model = [folder] if command == "engine-args" else ["--model", folder]
    options = ["--port", 0] if command == "serve" else []
    assert_denied(run(command, *model, *options, lines="x"), folder / "model.safetensors")


def test_evaluation_says_so(tmp_path: Path) -> None:
    """Data that may not be read is named, also if it is a folder."""
    data = tmp_path / "data"
    (data / "sts").mkdir(parents=True)
    data.chmod(0o077)
    done = run("eval", "--data", data / "sts")
    data.chmod(0o700)
    assert_denied(done, data / "sts")


def test_the_hubs_cache_is_named(tmp_path: Path) -> None:
    """A cached model that may not be read is not reported as missing, or as no network."""
    cache = tmp_path / "hub" / "models--owner--name"
    (cache / "snapshots").mkdir(parents=True)
    (tmp_path / "hub").chmod(0o077)
    done = run("check", "owner/name", HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    (tmp_path / "hub").chmod(0o700)
    assert_denied(done, cache)


@pytest.mark.parametrize("option", ["--keys-file", "--tls-cert", "--tls-key"])
def test_other_files_say_so_before_the_model_is_loaded(
    keys_and_certificate: dict[str, Path], option: str
) -> None:
    """Keys and certificates that may not be read are named with the user id."""
    keys_and_certificate[option].chmod(0o077)
    options = [word for pair in keys_and_certificate.items() for word in pair]
    done = run("serve", "--port", 0, *options, "--in-process", "--model", "/no/such/model")
    assert_denied(done, keys_and_certificate[option])


def test_certificates_of_engine_servers_say_so(keys_and_certificate: dict[str, Path]) -> None:
    """The same holds for --engine-ca."""
    authorities = keys_and_certificate["--tls-cert"]
    authorities.chmod(0o077)
    servers = ["--engine", "remote", "--engine-url", "https://127.0.0.1:1"]
    assert_denied(run("serve", "--port", 0, *servers, "--engine-ca", authorities), authorities)


@pytest.fixture
def keys_and_certificate(tmp_path: Path) -> dict[str, Path]:
    """Options of serve with readable files."""
    files = {
        "--keys-file": tmp_path / "keys.toml",
        "--tls-cert": tmp_path / "cert.pem",
        "--tls-key": tmp_path / "key.pem",
    }
    files["--keys-file"].write_text(f'[[keys]]\nname = "a"\nsha256 = "{"0" * 64}"\n')
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(files["--tls-cert"])
    certificate.private_key_pem.write_to_path(files["--tls-key"])
    return files


def assert_denied(
    done: CompletedProcess[str], path: Path, mode: str = "0077", owner: int | None = None
) -> None:
    """Check the message of a command that may not read a path."""
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("taskvec: ")]
    assert done.returncode in (2, 3)
    assert str(path) in line
    user = os.geteuid()
    assert f"permission denied to user id {user}" in line
    assert f"belongs to user id {user if owner is None else owner} and has the mode {mode}" in line
    assert not any(word in line for word in ("damaged", "download", "network", "missing"))
