"""Opening a checkpoint by name: the built-in model, folders and the local hub cache.

The hub's library reads its environment when imported, so the cache is tried in processes of their
own, with the network switched off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import taskvec
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.errors import CheckpointError

FIRST, SECOND = "a" * 40, "0123456789abcdef0123456789abcdef01234567"
MODEL = "someone/tiny-v5"

OPEN = """
import dataclasses, json, sys
from taskvec.checkpoint.open import open_checkpoint
from taskvec.errors import CheckpointError
try:
    checkpoint = open_checkpoint(*sys.argv[1:])
except CheckpointError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({"folder": str(checkpoint.folder), **dataclasses.asdict(checkpoint.card)}))
"""


@pytest.fixture
def cache(tmp_path: Path, default_checkpoint: Checkpoint) -> Path:
    """A hub cache with two commits of one model: main is the second, v1 the first."""
    model = tmp_path / "hub" / "models--someone--tiny-v5"
    for commit in (FIRST, SECOND):
        (model / "snapshots").mkdir(parents=True, exist_ok=True)
        link_files(default_checkpoint.folder, model / "snapshots" / commit)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(SECOND)
    (model / "refs" / "v1").write_text(FIRST)
    return model.parent


def test_the_built_in_model_needs_no_folder(tmp_path: Path, monkeypatch: Any) -> None:
    """The default name is the checkpoint in the package, even if a folder has that name."""
    (tmp_path / DEFAULT_MODEL).mkdir()
    monkeypatch.chdir(tmp_path)
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    assert checkpoint.folder == Path(taskvec.__file__).parent / "default_model"
    assert (checkpoint.card.name, checkpoint.card.revision) == (DEFAULT_MODEL, None)


def test_a_folder_is_named_after_itself(
    tmp_path: Path, default_checkpoint: Checkpoint, monkeypatch: Any
) -> None:
    """The model of an absolute or relative folder has the folder's name and no revision."""
    folder = link_files(default_checkpoint.folder, tmp_path / "mine")
    monkeypatch.chdir(folder)
    for spelling in (str(folder), f"{folder}/", "../mine", "."):
        card = open_checkpoint(spelling, "ignored").card
        assert (card.name, card.revision) == ("mine", None)


def test_a_folder_goes_before_a_hub_id(
    tmp_path: Path, default_checkpoint: Checkpoint, monkeypatch: Any
) -> None:
    """A relative path of the form owner/name that exists is a folder."""
    link_files(default_checkpoint.folder, tmp_path / "someone" / "tiny-v5")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint(MODEL).card.name == "tiny-v5"


def test_a_tilde_is_the_home_folder(
    tmp_path: Path, default_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """~ is expanded, because the arguments of a container are not expanded by a shell."""
    link_files(default_checkpoint.folder, tmp_path / "models" / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/models/mine").card.name == "mine"


@pytest.mark.parametrize(
    "name",
    ["no-such-model", "/no/such/folder", "./none", "a/b/c", "a b/c", "~nobody-here/x", "x" * 300],
    ids=lambda name: name[:16],
)
def test_what_is_nothing_is_refused(name: str) -> None:
    """A name that is neither a folder nor a hub id is rejected with the alternatives."""
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(name)
    sentence = str(refused.value)
    assert repr(name) in sentence
    assert DEFAULT_MODEL in sentence
    assert "owner/name" in sentence
    assert "\n" not in sentence


def test_an_empty_name_is_refused(
    tmp_path: Path, default_checkpoint: Checkpoint, monkeypatch: Any
) -> None:
    """An empty name is not the working directory."""
    monkeypatch.chdir(link_files(default_checkpoint.folder, tmp_path / "mine"))
    with pytest.raises(CheckpointError, match="''"):
        open_checkpoint("")


@pytest.mark.parametrize(
    "name", ["owner/bad--name", "owner/na..me", "owner/name.", "o/" + "n" * 99]
)
def test_an_impossible_hub_id_is_refused(cache: Path, name: str) -> None:
    """A name that the hub does not allow is rejected with a message of one line."""
    answer = opened(cache, name)
    assert name in answer["error"]
    assert "\n" not in answer["error"]


def test_a_cached_model_is_found_offline(cache: Path) -> None:
    """A hub id is read from the local cache without a network; its revision is the commit."""
    card = opened(cache, MODEL)
    assert (card["name"], card["revision"]) == (MODEL, SECOND)
    assert Path(card["folder"]).name == SECOND
    assert card["adapters"]


@pytest.mark.parametrize(
    ("revision", "commit"), [("main", SECOND), ("v1", FIRST), (FIRST, FIRST), (SECOND, SECOND)]
)
def test_a_revision_picks_the_commit(cache: Path, revision: str, commit: str) -> None:
    """A branch, tag or commit selects its snapshot; the card has the commit."""
    assert opened(cache, MODEL, revision)["revision"] == commit


@pytest.mark.parametrize(
    ("model", "revision"),
    [("someone/other", None), (MODEL, "no-such-branch"), (MODEL, "b" * 40)],
    ids=["model", "branch", "commit"],
)
def test_what_is_not_cached_says_what_to_do(cache: Path, model: str, revision: str | None) -> None:
    """Without a network, a model that is not in the cache is rejected with possible solutions."""
    sentence = opened(cache, model, *([revision] if revision else []))["error"]
    assert model in sentence
    assert "HF_HUB_OFFLINE" in sentence
    assert "folder" in sentence
    assert "\n" not in sentence


def test_a_half_fetched_model_names_the_file(cache: Path) -> None:
    """For the snapshot of an interrupted download, the message names the missing file."""
    snapshot = cache / "models--someone--tiny-v5" / "snapshots" / SECOND
    (snapshot / "model.safetensors").unlink()
    assert f"{SECOND}/model.safetensors is missing" in opened(cache, MODEL)["error"]


def test_the_command_exits_with_three(cache: Path) -> None:
    """`taskvec check` of a missing model exits with 3 and a message without a traceback."""
    command = [sys.executable, "-m", "taskvec", "check", "someone/other", "--revision", "v9"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=environment(cache)
    )
    assert (done.returncode, done.stdout) == (3, "")
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("taskvec: someone/other ")


def opened(cache: Path, *arguments: str) -> dict[str, Any]:
    """Return the card, or the error, of open_checkpoint in a process with only this hub cache."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment(cache),
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a process without a network, with this hub cache."""
    hub = {"HF_HOME": str(cache.parent), "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | hub


def link_files(source: Path, target: Path) -> Path:
    """Create a checkpoint of links, as in the hub's cache."""
    for file in source.rglob("*"):
        if file.is_file():
            link = target / file.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return target
