"""What the pages say of the code is so: modules, error codes, settings."""

from __future__ import annotations

import re

from conftest import repository
from pages import PAGES, blocks
from taskvec.errors import CODES
from taskvec.settings import Settings, environment_variable

SERVICE = repository() / "service" / "taskvec"
NO_ROOMS = {"__init__", "__main__"}
FIELDS = (
    "body",
    "model",
    "input_type",
    "normalized",
    "task",
    "task_type",
    "truncate",
    "truncation",
)
"""Those of ``invalid_`` and a field's name, as the page says."""


def test_the_page_names_every_module() -> None:
    """Each module has its place in the list of rooms, and nothing is listed that is gone."""
    rooms, _, _ = next(blocks(PAGES["docs/architecture.md"])).content.partition("training/")
    modules = {file.name for file in SERVICE.rglob("*.py") if file.stem not in NO_ROOMS}
    assert set(re.findall(r"\b\w+\.py\b", rooms)) == modules


def test_the_page_lists_every_error_code() -> None:
    """docs/behaviour.md has each code that a client may see."""
    shown = set(re.findall(r"`(\w+)`", PAGES["docs/behaviour.md"].read_text()))
    assert set(CODES) - {f"invalid_{field}" for field in FIELDS} - {"client_closed"} <= shown


def test_every_setting_that_is_named_exists() -> None:
    """No page names a variable of ours that nothing reads; two are no settings of the service."""
    known = {environment_variable(field) for field in Settings.model_fields}
    known |= {"TASKVEC_PUBLISHED_PORT", "TASKVEC_EVAL_KEY"}
    named = {
        (page, name)
        for page, file in PAGES.items()
        for name in re.findall(r"TASKVEC_[A-Z_]+[A-Z]", file.read_text())
        if name not in known
    }
    assert not named
