"""How vLLM servers and taskvec servers are asked for vectors: token ids out, raw bytes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import ModelCard
from taskvec.engines.base import TokenIds
from taskvec.engines.remote.client import Call, Connection, Outcome, ServerFault
from taskvec.engines.wire import ADAPTERS_HEADER, WIRE_PATH, WIRE_TYPE, pack_texts
from taskvec.priority import Priority

Vectors = NDArray[np.float32]

_LONGEST_LISTING = 1 << 20


class Dialect(Protocol):
    """How one kind of server is asked.

    Attributes:
        mixes: True where the texts of one call may have different adapters.
    """

    mixes: bool

    def call(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        seconds: float,
        priority: Priority,
    ) -> Call:
        """What to send for some texts, whose vectors are wanted within so many seconds."""


class VllmProtocol:
    """vLLM's OpenAI server: adapters are models, vectors come as bytes without a header."""

    mixes = False

    def __init__(self, base: str) -> None:
        """Remember what the backbone without an adapter is called."""
        self._base = base

    def call(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        seconds: float,  # noqa: ARG002 - vLLM knows no deadline: a closed connection ends a call
        priority: Priority,  # noqa: ARG002 - vLLM's own is a setting of its start, and strict
    ) -> Call:
        """See ``Dialect``."""
        body = {
            "model": adapters[0] or self._base,
            "input": [text.tolist() for text in texts],
            "encoding_format": "bytes_only",
            "embed_dtype": "float32",
            "endianness": "little",
            "use_activation": False,  # not normalised
        }
        return Call("/v1/embeddings", orjson.dumps(body), {"content-type": "application/json"})


class TaskvecProtocol:
    """Another taskvec server, which accepts token ids."""

    mixes = True

    def call(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        seconds: float,
        priority: Priority,
    ) -> Call:
        """See ``Dialect``."""
        names, body = pack_texts(texts, adapters)
        headers = {
            "content-type": WIRE_TYPE,
            ADAPTERS_HEADER: names,
            "x-request-timeout-ms": str(max(1, int(seconds * 1000))),
            "x-priority": priority.value,
        }
        return Call(WIRE_PATH, body, headers)


async def recognise(
    connection: Connection, card: ModelCard, max_tokens: int, seconds: float
) -> Dialect:
    """Find out what kind of server answers, and that it serves what we need.

    Raises:
        ServerFault: it cannot be reached, is no such server, lacks an adapter, or takes shorter
            texts than we send.
    """
    listing = await connection.get("/v1/models", _LONGEST_LISTING, seconds)
    try:
        entries = {str(entry["id"]): entry for entry in orjson.loads(listing)["data"]}
    except (ValueError, KeyError, TypeError):
        raise ServerFault(
            Outcome.WRONG, "its /v1/models is no list of models: it is no vLLM or taskvec server"
        ) from None
    roots = [name for name, entry in entries.items() if not entry.get("parent")]
    if any(entry.get("owned_by") == "vllm" for entry in entries.values()) and roots:
        base_name = roots[0]
        longest = entries[base_name].get("max_model_len")
        missing = [name for name in card.adapters if name not in entries]
        dialect: Dialect = VllmProtocol(base_name)
        flag = "--max-model-len"
    elif roots and "tasks" in entries[roots[0]]:
        tasks = {str(name) for name in _listed(entries[roots[0]]["tasks"])}
        tasks |= {name.partition(".")[0] for name in tasks}  # retrieval.query: adapter retrieval
        longest = entries[roots[0]].get("max_tokens")
        missing = [name for name in card.adapters if name not in tasks]
        if not entries[roots[0]].get("token_input"):
            raise ServerFault(
                Outcome.WRONG, "it takes no token ids: start it with TASKVEC_TOKEN_INPUT=accept"
            )
        dialect = TaskvecProtocol()
        flag = "--max-tokens"
    else:
        raise ServerFault(Outcome.WRONG, "it is neither a vLLM nor a taskvec server")
    if missing:
        raise ServerFault(
            Outcome.WRONG,
            f"it does not serve the adapters {', '.join(missing)}; taskvec engine-args prints the "
            "command line of a server that does",
        )
    if isinstance(longest, int) and longest < max_tokens:
        raise ServerFault(
            Outcome.WRONG,
            f"it takes texts of {longest} tokens, this gateway sends up to {max_tokens}: raise its "
            f"{flag}, or lower --max-tokens here",
        )
    return dialect


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def read_vectors(content: bytes, texts: int, dimension: int) -> Vectors:
    """The vectors in a server's answer: float32 [texts, dimension], every value finite.

    Raises:
        ServerFault: it is something else.
    """
    size = texts * dimension * 4
    if len(content) != size:
        raise ServerFault(
            Outcome.WRONG,
            f"it sent {len(content)} bytes or more for {texts} vectors of {dimension} values, not "
            f"{size}",
        )
    vectors: Vectors = np.frombuffer(content, dtype="<f4").reshape(texts, dimension)
    if not np.isfinite(vectors).all():
        raise ServerFault(Outcome.WRONG, "it sent values that are not finite")
    return vectors
