"""Write docs/configuration.md and .env.example from the settings (``make docs``)."""

from __future__ import annotations

import enum
import json
import types
import typing
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from taskvec.settings import Settings, environment_variable

ROOT = Path(__file__).parents[1]

INTRODUCTION = """# Configuration

Every setting is an option of `taskvec serve` and an environment variable; the option takes precedence.
`make docs` writes this page and `.env.example` from `service/taskvec/settings.py`.

| setting | environment variable | values | default | meaning |
|---|---|---|---|---|
"""


def configuration_page() -> str:
    """Return the content of docs/configuration.md."""
    rows = []
    for name, field in Settings.model_fields.items():
        secret = field.annotation == SecretStr | None
        option = "only the variable" if secret else f"`--{name.replace('_', '-')}`"
        variable = f"`{environment_variable(name)}`"
        default = f"`{_text(field.default)}`" if _text(field.default) else "none"
        cells = [option, variable, _values(field), default, field.description or ""]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return INTRODUCTION + "".join(rows)


def environment_file() -> str:
    """Return the content of .env.example: every variable with its default, commented out."""
    parts = ["# Settings of taskvec; docs/configuration.md explains them.\n"]
    for name, field in Settings.model_fields.items():
        parts.append(f"\n# {field.description}\n")
        parts.append(f"# {environment_variable(name)}={_text(field.default)}\n")
    return "".join(parts)


def pages() -> dict[Path, str]:
    """Return the content of each generated file."""
    return {
        ROOT / "docs" / "configuration.md": configuration_page(),
        ROOT / ".env.example": environment_file(),
    }


def _text(default: object) -> str:
    if default is None:
        return ""
    if isinstance(default, enum.Enum):
        return str(default.value)
    if isinstance(default, tuple):
        return ",".join(default)
    if isinstance(default, dict):
        return json.dumps(default) if default else ""
    return str(default).lower() if isinstance(default, bool) else str(default)


def _values(field: FieldInfo) -> str:
    kind = field.annotation
    if isinstance(kind, types.UnionType):
        kind = next(part for part in typing.get_args(kind) if part is not types.NoneType)
    if isinstance(kind, enum.EnumType):
        return ", ".join(f"`{member.value}`" for member in kind)
    names: dict[object, str] = {
        bool: "`true`, `false`",
        int: "whole number",
        float: "number",
        str: "text",
        Path: "path",
        SecretStr: "text",
        dict[str, Any]: "JSON object",
        tuple[str, ...]: "names, separated by commas",
    }
    name = names[kind]
    bounds = [
        f"{sign} {limit}"
        for part in field.metadata
        for attribute, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"))
        if (limit := getattr(part, attribute, None)) is not None
    ]
    return ", ".join([name, *bounds])


if __name__ == "__main__":
    for file, content in pages().items():
        file.write_text(content)
        print(f"wrote {file.relative_to(ROOT)}")
