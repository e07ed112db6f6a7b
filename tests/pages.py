"""The project's Markdown pages: their links, their anchors, their fenced blocks and commands."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token

from conftest import repository

ROOT = repository()
MARKDOWN = MarkdownIt("commonmark").enable("table")
OUTPUT_PREFIX = "# -> "
"""Prefix of a comment with the expected output of the command above it."""


class Block(NamedTuple):
    """A fenced block: its location (page and line), the language after its fence, its content."""

    location: str
    language: str
    content: str


class Command(NamedTuple):
    """A shell command, and its expected output if the page states it; ``...`` matches anything."""

    text: str
    output: str


OWN = {".ci", ".github", ".dockerignore", ".env.example", ".gitignore"}
"""Committed files and folders whose names start with a dot."""


def _files() -> list[Path]:
    """Return the files of the project, without what it installs, builds or keeps in caches."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():  # an archive of the project, or a bare machine
        own = [path for path in ROOT.iterdir() if path.name in OWN or path.name[0] != "."]
        found = [file for path in own for file in (path.rglob("*") if path.is_dir() else [path])]
        return sorted(file for file in found if "__pycache__" not in file.parts)
    command = [git, "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(ROOT / line for line in listed.splitlines() if (ROOT / line).exists())


FILES = _files()

PAGES = {str(file.relative_to(ROOT)): file for file in FILES if file.suffix == ".md"}
"""All pages, by path in the repository."""

INTEGRATIONS = "docs/integrations.md"
"""The page whose examples tests/real_clients runs, where the products are installed."""

COMMITTED = {parent for file in FILES for parent in (file, *file.parents)}
"""All files of the project, and their folders."""


@functools.cache
def _tokens(page: Path) -> list[Token]:
    return MARKDOWN.parse(page.read_text())


def links(page: Path) -> Iterator[str]:
    """Yield the targets of a page's links and pictures."""
    for token in _tokens(page):
        for child in token.children or ():
            target = child.attrGet("href" if child.type == "link_open" else "src")
            if target is not None:
                yield str(target)


@functools.cache
def anchors(page: Path) -> frozenset[str]:
    """Return the fragments of a page's headings, as GitHub generates them."""
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
    """Yield a page's fenced blocks, from top to bottom."""
    for token in _tokens(page):
        if token.type == "fence":
            line = token.map[0] + 1 if token.map else 0
            yield Block(f"{page.relative_to(ROOT)}:{line}", token.info, token.content)


def commands(block: Block) -> Iterator[Command]:
    """Yield the commands of a shell block: one line each, or several inside a quotation."""
    text, output = "", ""
    for line in [*block.content.splitlines(), ""]:
        if text and _is_complete(text):
            if line.startswith(OUTPUT_PREFIX):
                output = line.removeprefix(OUTPUT_PREFIX)
                continue
            if shlex.split(text, comments=True):
                yield Command(text.replace("\\\n", " ").strip(), output)
            text, output = "", ""
        text += f"{line}\n"
    assert not text.strip(), f"{block.location}: {text} does not end"


def _is_complete(text: str) -> bool:
    """Return whether a command is complete: no open quotation and no continued line."""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return False
    return not text.rstrip("\n").endswith("\\")
