"""The Dockerfile as stages of instructions, and its steps carried out without Docker."""

from __future__ import annotations

import json
import os
import re
import shutil
import string
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

USER = 65532
"""Whom the images run as."""


@dataclass
class Stage:
    """One stage.

    Attributes:
        base: what it is built on, a stage or an image.
        steps: instructions and their texts, in order.
    """

    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        """The texts of one instruction."""
        return [text for name, text in self.steps if name == instruction]


def read_stages(file: Path) -> dict[str, Stage]:
    """Every stage by its name."""
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    for line in filter(None, joined.splitlines()):
        instruction, text = line.split(maxsplit=1)
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", text).groups()
            stages[name] = Stage(string.Template(base).substitute(arguments))
        elif not stages:
            assert instruction == "ARG"
            arguments |= [text.split("=", 1)]
        else:
            stages[list(stages)[-1]].steps.append((instruction, text))
    return stages


def lineage(stages: dict[str, Stage], name: str) -> Iterator[Stage]:
    """A stage after all stages that it is built on."""
    stage = stages[name]
    if stage.base in stages:
        yield from lineage(stages, stage.base)
    yield stage


def context(checkout: Path) -> list[Path]:
    """The files that .dockerignore lets into a build, relative to the checkout."""
    rules = [
        line
        for line in (checkout / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert rules[0] == "*", "what is let in is listed"
    let_in = [rule[1:] for rule in rules if rule.startswith("!")]
    kept_out = [rule.removeprefix("**/") for rule in rules if rule.startswith("**/")]
    assert len(rules) == 1 + len(let_in) + len(kept_out), "a rule that this does not know"
    return [
        file.relative_to(checkout)
        for name in let_in
        for file in [checkout / name, *(checkout / name).rglob("*")]
        if file.is_file()
        and not any(fnmatch(part, rule) for part in file.parts for rule in kept_out)
    ]


class Sandbox:
    """A folder that stands for the root of an image, all stages in one.

    Absolute paths of the Dockerfile's own folders are moved below it.
    """

    FOLDERS = ("/build", "/wheels", "/opt/taskvec", "/cache", "/etc")

    def __init__(self, root: Path, checkout: Path, python: str) -> None:
        """An empty root.

        Args:
            root: the folder.
            checkout: what is built.
            python: the interpreter of which a copy stands for the base image's.
        """
        self._checkout = checkout
        self._root = root
        self._user = USER if os.geteuid() == 0 else os.geteuid()
        self._directory = root
        subprocess.run([python, "-m", "venv", root / "usr"], check=True)
        (root / "etc").mkdir()
        # Where pip finds packages is this machine's affair: its variables, and its file at home.
        own = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        self._clean = own | {"PATH": f"{root}/usr/bin:/usr/bin:/bin", "HOME": str(Path.home())}
        self.environment = self._clean

    def build(self, stages: dict[str, Stage], name: str) -> None:
        """Carry out the steps of a stage and of all that it needs."""
        self._directory = self._root
        self.environment = dict(self._clean)
        for stage in lineage(stages, name):
            for instruction, text in stage.steps:
                if instruction == "WORKDIR":
                    self._directory = Path(self._moved(text))
                    self._directory.mkdir(parents=True, exist_ok=True)
                elif instruction == "COPY" and not text.startswith("--from="):
                    self._copy(text.split())
                elif instruction == "RUN":
                    self._run(text)
                elif instruction == "ENV":
                    for variable, value in re.findall(r"(\w+)=(\S*)", self._moved(text)):
                        path = self.environment["PATH"]
                        self.environment[variable] = value.replace("$PATH", path)

    def process(self, command: str, **more: str) -> subprocess.Popen[bytes]:
        """Start a command in exec form, as the image's user and with its environment."""
        return subprocess.Popen(
            json.loads(command),
            cwd=self._directory,
            env=self.environment | more,
            user=self._user if os.geteuid() == 0 else None,
            group=self._user if os.geteuid() == 0 else None,
            extra_groups=[] if os.geteuid() == 0 else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def close(self, writable: str) -> None:
        """Take away everybody's right to write, but for one folder."""
        kept = Path(self._moved(writable))
        for folder, _, files in os.walk(self._root):
            if not Path(folder).is_relative_to(kept):
                for file in [Path(folder), *(Path(folder) / name for name in files)]:
                    if not file.is_symlink():
                        file.chmod(file.stat().st_mode & ~0o222)

    def _copy(self, words: list[str]) -> None:
        *sources, target = words
        here = Path(self._moved(target)) if target.startswith("/") else self._directory / target
        let_in = context(self._checkout)
        for source in map(Path, sources):
            found = [file for file in let_in if file == source or source in file.parents]
            assert found, f"COPY {source}: .dockerignore leaves nothing of it"
            for file in found:
                inner = file.relative_to(source) if file != source else Path(file.name)
                to_folder = target.endswith("/") or len(sources) > 1 or file != source
                place = here / inner if to_folder else here
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self._checkout / file, place)

    def _run(self, text: str) -> None:
        done = subprocess.run(
            ["/bin/sh", "-c", self._moved(text).replace(str(USER), str(self._user))],
            cwd=self._directory,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"RUN {text}\n{done.stdout}\n{done.stderr}"

    def _moved(self, text: str) -> str:
        names = "|".join(map(re.escape, self.FOLDERS))
        return re.sub(rf"(?<![\w./])({names})\b", lambda match: f"{self._root}{match[1]}", text)
