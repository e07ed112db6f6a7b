"""Links of the documentation are valid."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

import pytest

from pages import COMMITTED, PAGES, anchors, links


@pytest.mark.parametrize("page", PAGES)
def test_every_link_is_valid(page: str) -> None:
    """A link leads to a committed file, to a heading of a page, or to a complete URL."""
    file = PAGES[page]
    for link in links(file):
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            assert parts.scheme in ("http", "https"), link
            assert "." in (parts.hostname or ""), link
            continue
        target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
        assert target in COMMITTED, f"{link}: no such file"
        if parts.fragment:
            assert parts.fragment in anchors(target), f"{link}: no such heading"


def test_every_page_can_be_reached() -> None:
    """Every page can be reached from the README by links to pages or to their folders."""
    start = PAGES["README.md"]
    seen, new = set(), {start}
    while new:
        seen |= new
        found = {
            (page.parent / unquote(urlsplit(link).path)).resolve()
            for page in new
            for link in links(page)
            if not urlsplit(link).scheme and urlsplit(link).path
        }
        pages = {page for page in PAGES.values() if page in found or page.parent in found}
        new = pages - seen
    assert set(PAGES.values()) == seen
