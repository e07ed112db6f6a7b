"""What docs/training.md tells people to type does what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import free_port, repository


def test_the_walk_through_of_an_adapter_of_ones_own(tmp_path: Path) -> None:
    """Its commands train an adapter, serve it, and get vectors of it by name."""
    page = (repository() / "docs" / "training.md").read_text()
    section = page.split("## A task of your own")[1].split("\n## ")[0]
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL))
    for name, module in {"taskvec": "taskvec", "taskvec-train": "taskvec_train"}.items():
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        script.chmod(0o755)
    done = subprocess.run(
        [shutil.which("bash") or "", "--norc", "-ec", commands.replace("8080", str(free_port()))],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        timeout=240,
        check=True,
    )
    answers = [
        json.loads(line) for line in done.stdout.splitlines() if line.startswith(b'{"object')
    ]
    assert [len(answer["data"][0]["embedding"]) for answer in answers] == [256, 256]
    own = tmp_path / "my-model" / "adapters" / "legal-search" / "config_sentence_transformers.json"
    assert json.loads(own.read_text()) == {"prompts": {"query": "Question: ", "document": "Law: "}}
