"""Servers and the Node process that the tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import running_server
from keyfiles import entry
from real_clients.calls import Call

os.environ |= {
    "ANONYMIZED_TELEMETRY": "False",
    "DO_NOT_TRACK": "1",
    "HAYSTACK_TELEMETRY_ENABLED": "False",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
}
"""Nothing but the service is called."""

from real_clients import python_clients  # noqa: E402 - some libraries read the variables first
from real_clients.node_clients import NodeClients, node_clients  # noqa: E402
from real_clients.traits import NODE, PYTHON, Client  # noqa: E402

Embed = Callable[[Client, Call], list[list[float]]]

ALIASES = "--model-aliases=embed-v4.0"
"""llama-index's client for Cohere takes names of Cohere's models only."""


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """A server without API keys."""
    with running_server(ALIASES) as address:
        yield address


@pytest.fixture(scope="session")
def keyed_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with an API key, ``s3cret``."""
    file: Path = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(entry("web", "s3cret"))
    with running_server(ALIASES, "--keys-file", str(file)) as address:
        yield address


@pytest.fixture(scope="session")
def node() -> Iterator[NodeClients]:
    """The Node clients."""
    with node_clients() as clients:
        assert clients.names == [client.name for client in NODE]
        yield clients


@pytest.fixture(scope="session")
def embed(node: NodeClients) -> Embed:
    """Embed with a client of either language."""
    assert list(python_clients.CLIENTS) == sorted(
        (client.name for client in PYTHON), key=list(python_clients.CLIENTS).index
    )

    def call(client: Client, what: Call) -> list[list[float]]:
        embed = python_clients.embed if client in PYTHON else node.embed
        return embed(client.name, what)

    return call
