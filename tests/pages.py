"""The project's Markdown pages: their links, their anchors, their fenced blocks and commands."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

from conftest import repository

ROOT = repository()
MARKDOWN = MarkdownIt("commonmark").enable("table")
SAYS = "# -> "
"""Begins a comment that says what is printed above it."""


class Block(NamedTuple):
    """A fenced block: where it is, the word behind its fence, and what is in it."""

    place: str
    language: str
    content: str


class Command(NamedTuple):
    """A command of a shell, and what it prints where the page says so; ``...`` is anything."""

    text: str
    output: str


def _files(*patterns: str) -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(ROOT / line for line in listed.splitlines() if (ROOT / line).exists())


PAGES = {str(file.relative_to(ROOT)): file for file in _files("*.md")}
"""Every committed page by its path in the repository."""

COMMITTED = {parent for file in _files() for parent in (file, *file.parents)}
"""Every committed file, and the folders that hold them."""


@functools.cache
def _tokens(page: Path) -> list[Token]:
    return MARKDOWN.parse(page.read_text())


def links(page: Path) -> Iterator[str]:
    """Where a page's links and pictures lead."""
    for token in _tokens(page):
        for child in token.children or ():
            target = child.attrGet("href" if child.type == "link_open" else "src")
            if target is not None:
                yield str(target)


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """The fragments that lead to a page's headings, as GitHub makes them."""
    found: list[str] = []
    heading = False
    for token in _tokens(page):
        if heading:
            text = "".join(child.content for child in token.children or ())
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            again = sum(re.sub(r"-\d+$", "", other) == slug for other in found)
            found.append(f"{slug}-{again}" if again else slug)
        heading = token.type == "heading_open"
    return frozenset(found)


def blocks(page: Path) -> Iterator[Block]:
    """A page's fenced blocks, from top to bottom."""
    for token in _tokens(page):
        if token.type == "fence":
            line = token.map[0] + 1 if token.map else 0
            yield Block(f"{page.relative_to(ROOT)}:{line}", token.info, token.content)


def commands(block: Block) -> Iterator[Command]:
    """The commands of a block of shell, each in one line unless a quotation has several."""
    text, output = "", ""
    for line in [*block.content.splitlines(), ""]:
        if text and _whole(text):
            if line.startswith(SAYS):
                output = line.removeprefix(SAYS)
                continue
            if shlex.split(text, comments=True):
                yield Command(text.replace("\\\n", " ").strip(), output)
            text, output = "", ""
        text += f"{line}\n"
    assert not text.strip(), f"{block.place}: {text} does not end"


def _whole(text: str) -> bool:
    """Whether a command ends here: no quotation mark and no line is left open."""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return not text.rstrip("\n").endswith("\\")
