"""Every command and example of the documentation works as written.

The blocks of a page run from top to bottom, in a temporary folder, against a real server. Commands
that cannot run in a test are in ``INSTEAD``, with the reason and the check that replaces the run.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import httpx
import promql_parser
import pytest
import yaml

from examples import INSTEAD, Reader, instead
from pages import INTEGRATIONS, OUTPUT_PREFIX, PAGES, ROOT, Block, blocks, commands
from taskvec.auth.keys import KeyLimits, KeySource
from taskvec.settings import Settings, environment_variable

pytestmark = pytest.mark.full("the commands of the documentation")

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())


@pytest.mark.parametrize("page", [p for p in PAGES if p != INTEGRATIONS and any(blocks(PAGES[p]))])
def test_every_example_works(page: str, tmp_path: Path) -> None:
    """Commands succeed, programs print the output in their comments, data can be parsed."""
    with Reader(tmp_path) as reader:
        for block in blocks(PAGES[page]):
            assert block.language in KINDS, f"{block.location}: unknown language {block.language!r}"
            KINDS[block.language](reader, block)


def test_every_exception_is_needed() -> None:
    """Each entry of the list of commands that cannot run matches a command of a page."""
    texts = [
        command.text
        for page in PAGES.values()
        for block in blocks(page)
        if block.language == "sh"
        for command in commands(block)
    ]
    assert [one.pattern for one in INSTEAD if not any(map(one.pattern.match, texts))] == []


def shell(reader: Reader, block: Block) -> None:
    """Run each command, start it as a server, or check it in another way."""
    for command in commands(block):
        replacement = instead(command.text)
        if replacement is not None:
            replacement.check(reader, command.text)
        elif re.search(r"\btaskvec serve\b(?!.*--help)", command.text):
            reader.serve(command.text)
        else:
            printed = reader.run(["bash", "-euo", "pipefail", "-c"], command.text, block.location)
            assert not command.output or matches(command.output, printed), printed


def python(reader: Reader, block: Block) -> None:
    """Run the program, which must print exactly the output in its comments."""
    printed = reader.run([reader.python, "-c"], block.content, block.location).splitlines()
    lines = [line for line in block.content.splitlines() if line.startswith(OUTPUT_PREFIX)]
    assert not lines or len(lines) == len(printed), printed
    pairs = zip(lines, printed, strict=False)
    assert all(matches(line.removeprefix(OUTPUT_PREFIX), text) for line, text in pairs), printed


def matches(text: str, printed: str) -> bool:
    """Return whether the output is the expected text; ``...`` matches anything."""
    pattern = re.escape(text).replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def error(reader: Reader, block: Block) -> None:
    """Compare the error on the page with the response to such a request, without messages."""
    shown = json.loads(block.content)
    body = {"input": ["a text"] * 3 + ["a longer text " * 9_000]}
    answer = httpx.post(f"{reader.server()}/v1/embeddings", json=body, timeout=60).json()
    for each in (shown, answer):
        each["request_id"] = each["detail"] = each["error"]["message"] = "..."
    assert answer == shown


def key_file(reader: Reader, block: Block) -> None:
    """Read the key file, and find the key by the secret of the digest in it."""
    file = reader.folder / "example.toml"
    file.write_text(block.content)
    (shown,) = tomllib.loads(block.content)["keys"]
    key = KeySource(file, "", KeyLimits()).read().find(b"test")
    assert key is not None
    assert key.name == shown["name"]


def compose_file(_: Reader, block: Block) -> None:
    """Check that the file changes existing services, with variables that are settings."""
    variables = {environment_variable(field) for field in Settings.model_fields}
    for name, service in yaml.safe_load(block.content)["services"].items():
        assert name in COMPOSE["services"], block.location
        assert set(service["environment"]) <= variables, block.location


def queries(_: Reader, block: Block) -> None:
    """Parse the queries."""
    for query in block.content.splitlines():
        promql_parser.parse(query)


def plain_text(_: Reader, __: Block) -> None:
    """Accept any text: it cannot run."""


KINDS = {
    "sh": shell,
    "python": python,
    "json": error,
    "toml": key_file,
    "yaml": compose_file,
    "promql": queries,
    "text": plain_text,
}
