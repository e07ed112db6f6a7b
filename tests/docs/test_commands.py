"""Every command and example of the documentation works, as it stands there.

The blocks of a page are run from top to bottom, in a scratch folder, before a real server. What
cannot run in a test stands in ``SUBSTITUTES``, with the reason and what is checked in its place.
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

from examples import SUBSTITUTES, Reader, substitute_of
from pages import PAGES, ROOT, SAYS, Block, blocks, commands
from taskvec.auth.keys import KeyLimits, KeySource
from taskvec.settings import Settings, environment_variable

COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(PAGES[page]))])
def test_every_example_works(page: str, tmp_path: Path) -> None:
    """Commands end well, programs print what their comments say, data can be read."""
    with Reader(tmp_path) as reader:
        for block in blocks(PAGES[page]):
            assert block.language in KINDS, f"{block.place}: no test knows {block.language!r}"
            KINDS[block.language](reader, block)


def test_nothing_is_excused_that_is_not_there() -> None:
    """Each entry of the list of what cannot run is needed by a page."""
    texts = [
        command.text
        for page in PAGES.values()
        for block in blocks(page)
        if block.language == "sh"
        for command in commands(block)
    ]
    assert [way.pattern for way in SUBSTITUTES if not any(map(way.pattern.match, texts))] == []


def shell(reader: Reader, block: Block) -> None:
    """Each command runs, serves in the background, or is checked in another way."""
    for command in commands(block):
        way = substitute_of(command.text)
        if way is not None:
            way.check(reader, command.text)
        elif re.search(r"\btaskvec serve\b(?!.*--help)", command.text):
            reader.serve(command.text)
        else:
            printed = reader.run(["bash", "-euo", "pipefail", "-c"], command.text, block.place)
            assert not command.output or says(command.output, printed), printed


def python(reader: Reader, block: Block) -> None:
    """The program prints what its comments say, and nothing else."""
    printed = reader.run([reader.python, "-c"], block.content, block.place).splitlines()
    lines = [line for line in block.content.splitlines() if line.startswith(SAYS)]
    assert not lines or len(lines) == len(printed), printed
    pairs = zip(lines, printed, strict=False)
    assert all(says(line.removeprefix(SAYS), told) for line, told in pairs), printed


def says(text: str, printed: str) -> bool:
    """Whether that is what was printed; ``...`` is anything."""
    pattern = re.escape(text).replace(re.escape("..."), ".*")
    return re.fullmatch(pattern, printed.strip(), re.DOTALL) is not None


def error(reader: Reader, block: Block) -> None:
    """The answer on the page has the form of the answer to a request that is wrong in that way."""
    shown = json.loads(block.content)
    body = {"input": ["a text"] * 3 + ["a longer text " * 9_000]}
    answer = httpx.post(f"{reader.server()}/v1/embeddings", json=body, timeout=60).json()
    for told in (shown, answer):
        told["request_id"] = told["detail"] = told["error"]["message"] = "..."
    assert answer == shown


def key_file(reader: Reader, block: Block) -> None:
    """The server takes the file, and the secret whose digest is in it."""
    file = reader.folder / "example.toml"
    file.write_text(block.content)
    (shown,) = tomllib.loads(block.content)["keys"]
    key = KeySource(file, "", KeyLimits()).read().find(b"test")
    assert key is not None
    assert key.name == shown["name"]


def compose_file(_: Reader, block: Block) -> None:
    """It changes services that there are, by variables that are settings."""
    variables = {environment_variable(field) for field in Settings.model_fields}
    for name, service in yaml.safe_load(block.content)["services"].items():
        assert name in COMPOSE["services"], block.place
        assert set(service["environment"]) <= variables, block.place


def queries(_: Reader, block: Block) -> None:
    """Prometheus understands them."""
    for query in block.content.splitlines():
        promql_parser.parse(query)


def picture(_: Reader, __: Block) -> None:
    """Drawn in letters, there is nothing to run."""


KINDS = {
    "sh": shell,
    "python": python,
    "json": error,
    "toml": key_file,
    "yaml": compose_file,
    "promql": queries,
    "text": picture,
}
