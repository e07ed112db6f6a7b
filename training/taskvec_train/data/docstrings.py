"""Parse docstrings of Python source; names and summaries are the queries."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from taskvec_train.data.entries import Entry, fill_template, normalise_text, passages

_CODE = re.compile(r"^\s*(>>>|\.\.\.)|^\s*\.\. [\w-]+::|^\s*[-=~^*`#]{3,}\s*$")
_MARKUP = re.compile(r":[\w:]+:`~?([^`<]+?)(?:\s*<[^`]*>)?`|``?([^`]+)``?_?")
_SECTION = re.compile(r"^(Parameters|Returns|Yields|Raises|Examples?|References|See Also|Args):?$")
_QUESTIONS = ("{name}", "{name} in {project}", "what does {name} do", "{project} {name}")
_MIN_REST_CHARACTERS = 60


def parse_docstrings(folders: Sequence[Path], project: str) -> Iterator[Entry]:
    """Yield every docstring below the folders, except in tests. The entity is the file."""
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            name = str(file.relative_to(folder))
            if "/tests/" not in name and "/test_" not in name:
                yield from parse_module(file.read_text("utf-8", errors="replace"), name, project)


def parse_module(source: str, file: str, project: str) -> Iterator[Entry]:
    """Yield the docstrings of one file; nothing if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old files
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
    question = fill_template(_QUESTIONS, name=name, project=project) if name else ""
    summary, rest = paragraphs[0], paragraphs[1:]
    if sum(map(len, rest)) < _MIN_REST_CHARACTERS:
        yield Entry(file, " ".join(paragraphs), (question,) if question else (), project)
        return
    anchors = (question, summary) if question else (summary,)
    for number, passage in enumerate(passages(rest)):
        yield Entry(file, passage, anchors if not number else (), project)


def _prose(block: str) -> str:
    """Return a paragraph without code lines, rulers and reStructuredText markup."""
    lines = [line for line in block.splitlines() if not _CODE.match(line)]
    return normalise_text(_MARKUP.sub(lambda mark: mark[1] or mark[2], " ".join(lines)))
