"""The Dockerfile as stages of instructions."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass, field
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
