"""Facts that the pages state about the code: modules, packages, error codes, settings."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from conftest import repository
from pages import PAGES, blocks
from taskvec.api.unsupported import SERVED_VALUES, UNSUPPORTED, UNSUPPORTED_IN_ITEMS
from taskvec.errors import CODES
from taskvec.settings import Settings, environment_variable

SERVICE = repository() / "service" / "taskvec"
SVG = "{http://www.w3.org/2000/svg}"
PICTURE = ET.parse(repository() / "docs" / "architecture.svg")  # noqa: S314 - it is ours
UNLISTED = {"__init__", "__main__"}
FIELDS = (
    "body",
    "model",
    "input_type",
    "normalize",
    "normalized",
    "task",
    "task_type",
    "truncate",
    "truncation",
)
"""Fields with an error code ``invalid_FIELD``, which the page describes as a pattern."""


def test_the_page_lists_every_module() -> None:
    """docs/architecture.md lists each module under its package, and no module that is gone."""
    listing, _, _ = next(blocks(PAGES["docs/architecture.md"])).content.partition("training/")
    listed, package = set(), ""
    for line in listing.splitlines()[1:]:
        name = line.split(maxsplit=1)[0] if line.strip() else ""
        if name.endswith("/"):
            package = name
        elif name:
            listed.add(f"{package}{name}")
    modules = {
        str(file.relative_to(SERVICE))
        for file in SERVICE.rglob("*.py")
        if file.stem not in UNLISTED
    }
    assert listed == modules


def test_the_picture_shows_every_package() -> None:
    """docs/architecture.svg has a box for each package, and for the modules that connect them."""
    names = [text.text for text in PICTURE.iter(f"{SVG}text") if text.get("class") == "name"]
    packages = {file.parent.name for file in SERVICE.rglob("__init__.py")} - {SERVICE.name}
    assert set(names) == packages | {"library", "service"}
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "arrow",
    [path for path in PICTURE.iter(f"{SVG}path") if path.get("class") == "arrow"],
    ids=lambda arrow: f"{arrow.get('data-from')}-{arrow.get('data-to')}",
)
def test_arrows_of_the_picture_are_imports_that_point_down(arrow: ET.Element) -> None:
    """An arrow leads from a package to one below it, which the first one imports."""
    start, end = map(int, re.fullmatch(r"M\d+ (\d+)V(\d+)", arrow.get("d")).groups())
    assert start < end
    source, target = SERVICE / arrow.get("data-from"), arrow.get("data-to")
    files = [source.with_suffix(".py")] if not source.is_dir() else source.rglob("*.py")
    pattern = rf"^\s*(from taskvec\.{target}\b|from taskvec import .*\b{target}\b)"
    assert any(re.search(pattern, file.read_text(), re.MULTILINE) for file in files)


def test_the_page_lists_every_error_code() -> None:
    """docs/behaviour.md lists each error code that a client can see."""
    shown = set(re.findall(r"`(\w+)`", PAGES["docs/behaviour.md"].read_text()))
    assert set(CODES) - {f"invalid_{field}" for field in FIELDS} - {"client_closed"} <= shown


def test_the_page_lists_every_field_that_is_refused() -> None:
    """docs/behaviour.md lists the fields that are not served, and no others."""
    page = PAGES["docs/behaviour.md"].read_text()
    section = page.partition("### Fields that are not served")[2].partition("\n## ")[0]
    rows = section[section.index("| field") : section.index("An item cannot")]
    listed = set(re.findall(r"`(\w+)`", rows))
    served = {"task", "input_type", "input", "dimensions", "truncate"}
    values = {v for allowed in SERVED_VALUES.values() for v in allowed if isinstance(v, str)}
    assert listed - served - values == {*UNSUPPORTED, *UNSUPPORTED_IN_ITEMS}


def test_every_setting_that_is_named_exists() -> None:
    """Each TASKVEC_ variable on a page is a setting, or one of two that other programs read."""
    known = {environment_variable(field) for field in Settings.model_fields}
    known |= {"TASKVEC_PUBLISHED_PORT", "TASKVEC_EVAL_KEY"}
    named = {
        (page, name)
        for page, file in PAGES.items()
        for name in re.findall(r"TASKVEC_[A-Z_]+[A-Z]", file.read_text())
        if name not in known
    }
    assert not named
