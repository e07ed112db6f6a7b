"""Python source: names and summaries of functions and classes ask for their docstrings."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from taskvec_train.data.entries import Entry, ask, passages, tidy

_CODE = re.compile(r"^\s*(>>>|\.\.\.)|^\s*\.\. [\w-]+::|^\s*[-=~^*`#]{3,}\s*$")
_MARKUP = re.compile(r":[\w:]+:`~?([^`<]+?)(?:\s*<[^`]*>)?`|``?([^`]+)``?_?")
_SECTION = re.compile(r"^(Parameters|Returns|Yields|Raises|Examples?|References|See Also|Args):?$")
_QUESTIONS = ("{name}", "{name} in {project}", "what does {name} do", "{project} {name}")
_LEAST_REST = 60


def parse_docstrings(folders: Sequence[Path], project: str) -> Iterator[Entry]:
    """Every docstring below the folders, tests left out. The entity is the file."""
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            name = str(file.relative_to(folder))
            if "/tests/" not in name and "/test_" not in name:
                yield from parse_module(file.read_text("utf-8", errors="replace"), name, project)


def parse_module(source: str, file: str, project: str) -> Iterator[Entry]:
    """The docstrings of one file; one that cannot be parsed gives none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old file's invalid escapes
            module = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node, name in _documented(module, ""):
        text = ast.get_docstring(node) or ""
        yield from _entries(text, name, file, project)


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: _Documented, above: str) -> Iterator[tuple[_Documented, str]]:
    yield node, above
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{above}.{child.name}".strip("."))


def _entries(docstring: str, name: str, file: str, project: str) -> Iterator[Entry]:
    paragraphs = [
        prose
        for block in re.split(r"\n\s*\n", docstring)
        if (prose := _prose(block)) and not _SECTION.match(prose)
    ]
    if not paragraphs:
        return
    question = ask(_QUESTIONS, name=name, project=project) if name else ""
    summary, rest = paragraphs[0], paragraphs[1:]
    if sum(map(len, rest)) < _LEAST_REST:
        yield Entry(file, " ".join(paragraphs), (question,) if question else (), project)
        return
    anchors = (question, summary) if question else (summary,)
    for number, passage in enumerate(passages(rest)):
        yield Entry(file, passage, anchors if not number else (), project)


def _prose(block: str) -> str:
    """A paragraph without code lines, rulers and reStructuredText's marks."""
    lines = [line for line in block.splitlines() if not _CODE.match(line)]
    return tidy(_MARKUP.sub(lambda mark: mark[1] or mark[2], " ".join(lines)))
