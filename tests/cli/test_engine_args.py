"""``taskvec engine-args``: the command line of a vLLM server for all tasks of a model."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.vllm_copy import make_vllm_copy
from taskvec.engines.vllm.arguments import VllmOptions, server_command

COMMAND = "engine-args"


def run(
    *arguments: str, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run `python -m taskvec engine-args` with arguments and further environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "taskvec", COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=cwd,
        env=os.environ | variables,
    )


def printed(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Assert success and return the words of the printed line."""
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    return shlex.split(line)


def after(words: list[str], flag: str) -> str:
    """Return the word after a flag."""
    return words[words.index(flag) + 1]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_it_prints_the_server_s_command(
    default_checkpoint: Checkpoint, tmp_path: Path, device: str
) -> None:
    """Standard output has only the command, with the folder of each adapter."""
    words = printed(run("--device", device, "--cache-dir", str(tmp_path)))
    folder = make_vllm_copy(default_checkpoint, tmp_path)
    gpu = device == "cuda"
    assert words == server_command(default_checkpoint, folder, VllmOptions(), gpu=gpu)
    names = [word.partition("=")[0] for word in words[words.index("--lora-modules") + 1 :]]
    assert names == list(default_checkpoint.card.adapters)


def test_it_makes_the_copy_that_it_names(tmp_path: Path) -> None:
    """The model folder in the command exists and is a valid checkpoint without adapters."""
    words = printed(run("taskvec-mini", "--cache-dir", str(tmp_path)))
    assert words[:2] == ["vllm", "serve"]
    folder = Path(words[2])
    assert folder.is_relative_to(tmp_path)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen3Model"]
    assert read_checkpoint(folder, "bare").card.adapters == ()
    for home in words[words.index("--lora-modules") + 1 :]:
        assert (Path(home.partition("=")[2]) / "adapter_config.json").is_file()


def test_device_dtype_and_longest_text_are_chosen(tmp_path: Path) -> None:
    """A CPU server runs with --enforce-eager; --dtype and --max-tokens are passed on."""
    words = printed(
        run("--device", "cpu", "--dtype", "float32", "--max-tokens", "77",
            "--cache-dir", str(tmp_path))
    )  # fmt: skip
    assert "--enforce-eager" in words
    assert after(words, "--dtype") == "float32"
    assert after(words, "--max-model-len") == "77"
    usual = printed(run("--cache-dir", str(tmp_path)))
    assert "--enforce-eager" not in usual
    assert after(usual, "--dtype") == "bfloat16"
    assert after(usual, "--max-model-len") == "2048"


def test_a_folder_with_spaces_can_be_pasted(default_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Words with spaces or shell characters are quoted."""
    folder = tmp_path / "my $HOME; model's"
    shutil.copytree(default_checkpoint.folder, folder, copy_function=os.symlink)
    words = printed(run(str(folder), "--cache-dir", str(tmp_path / "a cache")))
    assert after(words, "--served-model-name") == folder.name
    assert words[-1].endswith(f"={folder}/adapters/{words[-1].partition('=')[0]}")
    assert Path(words[2]).is_relative_to(tmp_path / "a cache")


def test_paths_hold_wherever_the_command_runs(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Relative paths of model and cache are printed as absolute paths."""
    shutil.copytree(default_checkpoint.folder, tmp_path / "mine", copy_function=os.symlink)
    words = printed(run("mine", "--cache-dir", "cache", cwd=tmp_path))
    assert Path(words[2]).is_relative_to(tmp_path / "cache")
    homes = [word.partition("=")[2] for word in words[words.index("--lora-modules") + 1 :]]
    assert len(homes) == 4
    assert all(Path(home).is_relative_to(tmp_path / "mine") for home in homes)


def test_the_cache_is_the_server_s(tmp_path: Path) -> None:
    """Without --cache-dir the copy is made in the cache folder of the settings."""
    home = str(tmp_path / "home")
    words = printed(run(TASKVEC_CACHE_DIR=str(tmp_path / "set"), XDG_CACHE_HOME=home))
    assert Path(words[2]).is_relative_to(tmp_path / "set")
    words = printed(run(XDG_CACHE_HOME=home, TASKVEC_CACHE_DIR=""))
    assert Path(words[2]).is_relative_to(Path(home) / "taskvec")
    words = printed(run("--cache-dir", str(tmp_path / "x"), TASKVEC_CACHE_DIR=str(tmp_path)))
    assert Path(words[2]).is_relative_to(tmp_path / "x")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--device", "tpu"), "--device"),
        (("--device", "cuda:1"), "--device"),
        (("--dtype", "int8"), "--dtype"),
        (("--max-tokens", "many"), "--max-tokens"),
        (("--max-tokens", "-5"), "--max-tokens"),
        (("--no-such-option",), "--no-such-option"),
        (("a", "b"), "b"),
    ],
    ids=str,
)
def test_wrong_usage_exits_with_two(tmp_path: Path, arguments: tuple[str, ...], named: str) -> None:
    """An invalid value exits with 2 and an error that names its option."""
    done = run(*arguments, TASKVEC_CACHE_DIR=str(tmp_path), XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert named in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_cache_that_cannot_be_written_exits_with_three(tmp_path: Path) -> None:
    """The error is one sentence that names the option to change."""
    (tmp_path / "file").write_text("no folder")
    done = run("--cache-dir", str(tmp_path / "file"))
    assert (done.returncode, done.stdout) == (3, "")
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("taskvec: ")
    assert "--cache-dir" in sentence


def test_a_damaged_checkpoint_exits_with_three(
    default_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A damaged checkpoint gets the same error as from `taskvec check`."""
    folder = tmp_path / "model"
    shutil.copytree(default_checkpoint.folder, folder, copy_function=os.symlink)
    (folder / "tokenizer.json").unlink()
    for model, named in ((str(folder), "tokenizer.json is missing"), ("no/such/model", "folder")):
        done = run(model, "--cache-dir", str(tmp_path / "cache"))
        assert (done.returncode, done.stdout) == (3, "")
        (sentence,) = done.stderr.splitlines()
        assert named in sentence
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_options(flag: str) -> None:
    """The help lists every option, on standard output."""
    done = run(flag)
    assert (done.returncode, done.stderr) == (0, "")
    for option in ("--device", "--dtype", "--cache-dir", "--max-tokens", "--revision"):
        assert option in done.stdout
