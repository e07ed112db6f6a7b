"""The examples of docs/integrations.md work as written, or are marked as not run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import Reader
from pages import INTEGRATIONS, PAGES, Block, blocks
from real_clients.node_clients import NODE, PACKAGES

PAGE = PAGES[INTEGRATIONS]
RUNNERS = {
    "python": [Reader.python, "-c"],
    "js": [str(NODE), "--input-type=module", "--eval"],
}
"""Commands that run a block of a language; blocks of other languages are not run."""

OUTPUT = re.compile(r"^(?:#|//) -> (.*)$", re.MULTILINE)


@pytest.mark.parametrize(
    "block",
    [block for block in blocks(PAGE) if block.language in RUNNERS],
    ids=lambda block: block.location,
)
def test_an_example_works(block: Block, reader: Reader) -> None:
    """It runs, and prints what its comment says."""
    printed = reader.run(RUNNERS[block.language], block.content, block.location)
    assert printed.splitlines() == OUTPUT.findall(block.content)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """One server for all examples, and a folder in which Node finds the packages."""
    folder: Path = tmp_path_factory.mktemp("examples")
    (folder / "node_modules").symlink_to(PACKAGES / "node_modules")
    with Reader(folder) as reader:
        yield reader


def test_what_is_not_run_is_marked() -> None:
    """A product's section either has examples that run, or says that they are not run."""
    sections = re.split(r"^## (.+)\n", PAGE.read_text(), flags=re.MULTILINE)[1:]
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        languages = set(re.findall(r"^```(\w+)", text, re.MULTILINE))
        assert bool(languages & RUNNERS.keys()) != ("Not run here" in text), name
        assert not (languages & RUNNERS.keys()) or languages <= RUNNERS.keys(), name
