"""What this process may not read is reported as a permission, with the file and the user id."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trustme

from synthetic import TINY_SMALL, write_checkpoint

SHAPE = replace(
    TINY_SMALL, vocabulary=27_173, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8,
    intermediate=24, rank=4,
)  # fmt: skip
STRANGER = 54_321
"""User id without an entry in /etc/passwd."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

AS_STRANGER = """
import os, sys
os.setgroups([])
os.setgid(int(sys.argv[1]))
os.setuid(int(sys.argv[1]))
sys.argv = ["taskvec", *sys.argv[2:]]
from taskvec.cli.main import main
main()
"""

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
def place() -> Iterator[Path]:
    """A folder that everybody may enter, as pytest's are not."""
    with TemporaryDirectory() as place:
        Path(place).chmod(0o1777)
        yield Path(place)


@pytest.fixture
def folder(place: Path, sound: Path) -> Path:
    """A copy of the checkpoint."""
    return shutil.copytree(sound, place / "checkpoint")


def run(
    *arguments: object, lines: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command of taskvec as a user who owns nothing."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HOME", "XDG_CACHE_HOME") and not name.startswith("HF_")
    }
    return subprocess.run(
        [sys.executable, "-c", AS_STRANGER, str(STRANGER), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=inherited | environment,
        input=lines,
        cwd="/",
    )


def test_a_readable_checkpoint_passes(folder: Path) -> None:
    """Another user can serve a checkpoint that everybody may read."""
    done = run("check", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "passed: 1 adapters" in done.stdout


@pytest.mark.parametrize("kind", PATHS)
def test_a_denial_is_not_damage(folder: Path, kind: str) -> None:
    """The message names the file or folder, the user id, the owner and the mode, on one line."""
    path = folder / PATHS[kind]
    mode = 0o600 if path.is_file() else 0o700
    path.chmod(mode)
    assert_denied(run("check", folder), path, mode)


def test_a_folder_that_may_only_be_entered(folder: Path) -> None:
    """A folder of adapters whose names may not be listed is named."""
    (folder / "adapters").chmod(0o711)
    assert_denied(run("check", folder), folder / "adapters", 0o711)


def test_a_folder_above_is_named(folder: Path, place: Path) -> None:
    """The message names the folder above the checkpoint that may not be entered."""
    place.chmod(0o700)
    done = run("check", folder)
    place.chmod(0o1777)
    assert_denied(done, folder, 0o700)
    assert f"the folder {place} belongs" in done.stderr


@pytest.mark.parametrize("command", ["serve", "embed", "engine-args"])
def test_all_commands_say_so(folder: Path, command: str) -> None:
    """Every command that reads a checkpoint reports the denial alike."""
    (folder / "model.safetensors").chmod(0o600)
    model = [folder] if command == "engine-args" else ["--model", folder]
    assert_denied(run(command, *model, lines="x"), folder / "model.safetensors", 0o600)


def test_the_hubs_cache_of_another_user_is_named(place: Path) -> None:
    """A cached model that this user may not read is not reported as missing or as no network."""
    cache = place / "hub" / "models--owner--name"
    (cache / "snapshots").mkdir(parents=True)
    (place / "hub").chmod(0o700)
    done = run("check", "owner/name", HF_HUB_CACHE=str(place / "hub"), HF_HUB_OFFLINE="1")
    assert_denied(done, cache, 0o700)


@pytest.mark.parametrize("option", ["--keys-file", "--tls-cert", "--tls-key"])
def test_other_files_say_so_before_the_model_is_loaded(
    keys_and_certificate: dict[str, Path], option: str
) -> None:
    """Keys and certificates that this user may not read are named with the user id."""
    keys_and_certificate[option].chmod(0o600)
    options = [word for pair in keys_and_certificate.items() for word in pair]
    done = run("serve", "--port", "0", *options, "--in-process")
    assert_denied(done, keys_and_certificate[option], 0o600)
    assert "engine_ready" not in done.stderr


@pytest.fixture
def keys_and_certificate(place: Path) -> dict[str, Path]:
    """Options of serve with readable files."""
    files = {
        "--keys-file": place / "keys.toml",
        "--tls-cert": place / "cert.pem",
        "--tls-key": place / "key.pem",
    }
    files["--keys-file"].write_text(f'[[keys]]\nname = "a"\nsha256 = "{"0" * 64}"\n')
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(files["--tls-cert"])
    certificate.private_key_pem.write_to_path(files["--tls-key"])
    return files


def assert_denied(done: subprocess.CompletedProcess[str], path: Path, mode: int) -> None:
    """Check the message of a command that may not read a path."""
    assert done.returncode == 3, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("taskvec: ")]
    assert "Traceback" not in done.stderr
    assert str(path) in line
    assert f"permission denied to user id {STRANGER}" in line
    assert f"belongs to user id 0 and has the mode {mode:04o}" in line
    assert not any(word in line for word in ("damaged", "download", "network", "missing"))
