"""Parse HTML documentation; headings and terms are queries for sections and definitions.

Reads what Sphinx, DocBook, Doxygen and hand-written pages have in common: headings, paragraphs,
lists, and `dl` lists of terms. Navigation, code and tables of numbers are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lxml import etree, html

from taskvec_train.data.entries import (
    Entry,
    fill_template,
    normalise_text,
    passages,
    summary_and_rest,
)

_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
_BLOCKS = {"p", "li", "td", "blockquote", "figcaption", "caption"}
_SKIPPED = {
    *("script", "style", "nav", "header", "footer", "svg", "form", "button", "pre", "head"),
    "details",
}
_NAVIGATION = re.compile(
    r"\b(sphinxsidebar|related|toctree-wrapper|navheader|navfooter|toc|footer|sidebar|navigation"
    r"|breadcrumbs?|genindextable|modindextable|indextable|contents|prevnext|menu)\b"
)
_UNWANTED = re.compile(
    r"genindex|modindex|index-all|search|changelog|changes|whatsnew|requirements|/all\.|NEWS"
    r"|/releases?/|/javadoc/|/(?:da|de|es|fr|ja|ko|pt-br|ru|tr|zh-cn)/"
)
_LINKS = re.compile(r"¶|#$|\[source\]")
_VAGUE_WORDS = 2
_NUMBERING = re.compile(
    r"^(?:(?:Chapter|Appendix|Part)\s+\S+|\d+(?:\.\d+)*\.?|[A-Z](?:\.\d+)+\.?)\s+"
)
_NAME_QUESTIONS = ("{name}", "{name}", "what does {name} do", "how to use {name}")
_HEADING_QUESTIONS = (
    "{heading}",
    "{project} {heading}",
    "{heading} in {project}",
    "tell me about {heading} in {project}",
    "explain {heading}",
)
_MAX_ANCHOR = 200


@dataclass(slots=True)
class _Section:
    path: tuple[str, ...]
    is_term: bool
    blocks: list[str] = field(default_factory=list)


def parse_documents(folders: Sequence[Path], project: str) -> Iterator[Entry]:
    """Yield the passages of all HTML pages. The entity is the page, the label the project."""
    for folder in folders:
        for page in sorted((*folder.rglob("*.html"), *folder.rglob("*.xhtml"))):
            name = str(page.relative_to(folder))
            if not page.is_symlink() and not _UNWANTED.search(name):
                yield from parse_page(page.read_bytes(), name, project)


def parse_page(source: bytes, page: str, project: str) -> Iterator[Entry]:
    """Yield the passages of one page, with headings and terms as queries."""
    try:
        root = html.document_fromstring(source, parser=html.HTMLParser(encoding="utf-8"))
    except etree.ParserError:  # an empty page
        return
    body = root.find("body")
    if body is None:
        return
    sections = [_Section((), is_term=False)]
    _walk(body, sections, [])
    for section in sections:
        yield from _entries(section, page, project)


def _walk(parent: html.HtmlElement, sections: list[_Section], above: list[tuple[int, str]]) -> None:
    """Append the sections below `parent`; `above` are the open headings with their levels."""
    for element in parent:
        tag = element.tag
        if not isinstance(tag, str) or tag in _SKIPPED or _is_navigation(element):
            continue
        if tag in _HEADINGS:
            level = int(tag[1])
            while above and above[-1][0] >= level:
                above.pop()
            above.append((level, _NUMBERING.sub("", _text(element))))
            sections.append(_Section(tuple(title for _, title in above), is_term=False))
        elif tag == "dl":
            _walk_terms(element, sections, above)
        elif tag in _BLOCKS and not any(child.tag in {*_BLOCKS, "dl", "ul"} for child in element):
            sections[-1].blocks.append(_text(element))
        else:
            _walk(element, sections, above)


def _walk_terms(
    terms: html.HtmlElement, sections: list[_Section], above: list[tuple[int, str]]
) -> None:
    term = ""
    path = sections[-1].path
    for element in terms:
        if element.tag == "dt":
            term = _term_text(element)
        elif element.tag == "dd" and term:
            sections.append(_Section((*path, term), is_term=True))
            if not any(isinstance(child.tag, str) and child.tag in _BLOCKS for child in element):
                sections[-1].blocks.append(_text(element))
            _walk(element, sections, list(above))
    sections.append(_Section(path, is_term=False))


def _term_text(element: html.HtmlElement) -> str:
    """Return a term without its type and without a function's parameters."""
    for kind in element.find_class("classifier"):
        kind.drop_tree()
    return re.split(r"\(| = |: ", _text(element))[0].removeprefix("class ").strip(" :")


def _is_navigation(element: html.HtmlElement) -> bool:
    return bool(_NAVIGATION.search(element.get("class") or element.get("id") or ""))


def _text(element: html.HtmlElement) -> str:
    return normalise_text(_LINKS.sub(" ", str(element.text_content())))


def _entries(section: _Section, page: str, project: str) -> Iterator[Entry]:
    blocks = [block for block in section.blocks if block]
    parts = list(passages(blocks))
    if not parts:
        return
    anchors: tuple[str, ...] = ()
    if section.path and section.is_term:
        name = section.path[-1]
        summary, rest = summary_and_rest(parts[0])
        if summary:
            parts[0] = rest
            anchors = (fill_template(_NAME_QUESTIONS, name=name), summary)
        else:
            anchors = (_with_parent_heading(section.path[:-1], name),)
    elif section.path:
        heading = _with_parent_heading(section.path[:-1], section.path[-1])
        asked = heading.endswith("?")
        question = fill_template(_HEADING_QUESTIONS, heading=heading, project=project)
        anchors = (heading if asked else question,)
    anchors = tuple(anchor for anchor in anchors if 2 < len(anchor) <= _MAX_ANCHOR)
    yield Entry(page, parts[0], anchors, project)
    for part in parts[1:]:
        yield Entry(page, part, label=project)


def _with_parent_heading(above: tuple[str, ...], heading: str) -> str:
    """Prefix a heading of one or two words with the heading above it."""
    vague = heading.count(" ") < _VAGUE_WORDS and not heading.endswith("?")
    return f"{above[-1]} {heading}" if vague and above else heading
