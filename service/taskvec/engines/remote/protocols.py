"""HTTP protocols of vLLM servers and taskvec servers: token ids in, raw float32 bytes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from taskvec.checkpoint.backbone import ModelCard
from taskvec.engines.base import CallOutcome, TokenIds
from taskvec.engines.remote.client import HttpRequest, ServerCallError, ServerClient
from taskvec.engines.wire import ADAPTERS_HEADER, WIRE_PATH, WIRE_TYPE, pack_texts
from taskvec.priority import Priority

Vectors = NDArray[np.float32]

MAX_LISTING_BYTES = 1 << 20
"""Bytes that are read of the response of /v1/models."""


class ServerProtocol(Protocol):
    """The requests that one kind of server accepts.

    Attributes:
        mixes_adapters: True if the texts of one request may have different adapters.
    """

    mixes_adapters: bool

    def request(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        timeout_seconds: float,
        priority: Priority,
    ) -> HttpRequest:
        """Build the request for texts.

        Args:
            texts: int32 token ids [length] of each text.
            adapters: the adapter of each text; None for the bare backbone.
            timeout_seconds: time after which the caller stops waiting.
            priority: class of the request.
        """


class VllmProtocol:
    """OpenAI-compatible server of vLLM: an adapter is a model name; vectors are raw bytes."""

    mixes_adapters = False

    def __init__(self, base_model: str) -> None:
        """Create the protocol.

        Args:
            base_model: model name of the backbone without an adapter.
        """
        self._base_model = base_model

    def request(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        timeout_seconds: float,  # noqa: ARG002 - vLLM has no deadlines; closing the connection aborts
        priority: Priority,  # noqa: ARG002 - vLLM's priorities need a setting at its start
    ) -> HttpRequest:
        """See ``ServerProtocol``."""
        body = {
            "model": adapters[0] or self._base_model,
            "input": [text.tolist() for text in texts],
            "encoding_format": "bytes_only",
            "embed_dtype": "float32",
            "endianness": "little",
            "use_activation": False,  # not normalised
        }
        return HttpRequest(
            "/v1/embeddings", orjson.dumps(body), {"content-type": "application/json"}
        )


class TaskvecProtocol:
    """Another taskvec server that accepts token ids; see ``taskvec.engines.wire``."""

    mixes_adapters = True

    def request(
        self,
        texts: Sequence[TokenIds],
        adapters: Sequence[str | None],
        timeout_seconds: float,
        priority: Priority,
    ) -> HttpRequest:
        """See ``ServerProtocol``."""
        names, body = pack_texts(texts, adapters)
        headers = {
            "content-type": WIRE_TYPE,
            ADAPTERS_HEADER: names,
            "x-request-timeout-ms": str(max(1, int(timeout_seconds * 1000))),
            "x-priority": priority.value,
        }
        return HttpRequest(WIRE_PATH, body, headers)


async def detect_protocol(
    client: ServerClient, card: ModelCard, max_tokens: int, timeout_seconds: float
) -> ServerProtocol:
    """Detect the kind of a server from its /v1/models, and check what it serves.

    Args:
        client: client for the server.
        card: the model that the server must serve.
        max_tokens: longest text that will be sent, in tokens.
        timeout_seconds: timeout of the request.

    Raises:
        ServerCallError: the server cannot be reached, is of another kind, lacks an adapter, or
            accepts only shorter texts.
    """
    listing = await client.get("/v1/models", MAX_LISTING_BYTES, timeout_seconds)
    try:
        entries = {str(entry["id"]): entry for entry in orjson.loads(listing)["data"]}
    except (ValueError, KeyError, TypeError):
        raise ServerCallError(
            CallOutcome.WRONG,
            "its /v1/models is not a list of models: it is neither a vLLM nor a taskvec server",
        ) from None
    roots = [name for name, entry in entries.items() if not entry.get("parent")]
    if any(entry.get("owned_by") == "vllm" for entry in entries.values()) and roots:
        base_model = roots[0]
        accepted_tokens = entries[base_model].get("max_model_len")
        missing = [name for name in card.adapters if name not in entries]
        protocol: ServerProtocol = VllmProtocol(base_model)
        flag = "--max-model-len"
    elif roots and "tasks" in entries[roots[0]]:
        tasks = {str(name) for name in _as_list(entries[roots[0]]["tasks"])}
        tasks |= {name.partition(".")[0] for name in tasks}  # retrieval.query: adapter retrieval
        accepted_tokens = entries[roots[0]].get("max_tokens")
        missing = [name for name in card.adapters if name not in tasks]
        if not entries[roots[0]].get("token_input"):
            raise ServerCallError(
                CallOutcome.WRONG,
                "it does not accept token ids: start it with TASKVEC_TOKEN_INPUT=accept",
            )
        protocol = TaskvecProtocol()
        flag = "--max-tokens"
    else:
        raise ServerCallError(CallOutcome.WRONG, "it is neither a vLLM nor a taskvec server")
    if missing:
        raise ServerCallError(
            CallOutcome.WRONG,
            f"it does not serve the adapters {', '.join(missing)}; taskvec engine-args prints the "
            "command line of a server that does",
        )
    if isinstance(accepted_tokens, int) and accepted_tokens < max_tokens:
        raise ServerCallError(
            CallOutcome.WRONG,
            f"it accepts texts of {accepted_tokens} tokens, this gateway sends up to {max_tokens}: "
            f"raise its {flag}, or lower --max-tokens here",
        )
    return protocol


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def read_vectors(content: bytes, texts: int, dimension: int) -> Vectors:
    """Return the vectors of a response.

    Returns:
        float32 [texts, dimension]; ``find_unusable`` says whether they can be normalised.

    Raises:
        ServerCallError: the response has another size.
    """
    size = texts * dimension * 4
    if len(content) != size:
        raise ServerCallError(
            CallOutcome.WRONG,
            f"it sent {len(content)} bytes or more for {texts} vectors of {dimension} values, not "
            f"{size}",
        )
    return np.frombuffer(content, dtype="<f4").reshape(texts, dimension)


def find_unusable(vectors: Vectors) -> str | None:
    """Return why a vector has no usable length; None if all have one.

    A text can have such a vector by the checkpoint, so this alone does not prove a server wrong.

    Args:
        vectors: float32 [texts, dimension].
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors)
    if not np.isfinite(squares).all():
        return "it sent values that are not finite, or too large to normalise"
    if not squares.all():
        return "it sent a vector of zeros"
    return None


class DistinctVectors:
    """Finds out whether a server returns one vector for different texts.

    A checkpoint may have tokens with equal rows, so this alone does not prove the server wrong.

    Remembers the last text of the previous call, so that calls of one text are checked, too.
    """

    def __init__(self) -> None:
        """Start with nothing remembered."""
        self._last: tuple[TokenIds, str | None, NDArray[np.float32]] | None = None

    def repeats(
        self, texts: Sequence[TokenIds], adapters: Sequence[str | None], vectors: Vectors
    ) -> list[str | None]:
        """Return the adapters of two texts with different ids or adapters, and equal vectors.

        The list is empty if there are no such texts. One of the two may be the remembered one.
        Vectors with values that are not finite do not count as equal.
        """
        seen: dict[float, tuple[TokenIds, str | None, NDArray[np.float32]]] = {}
        if self._last is not None:
            seen[float(self._last[2][0])] = self._last
        for answer in zip(texts, adapters, vectors, strict=True):
            ids, adapter, vector = answer
            other = seen.setdefault(float(vector[0]), answer)
            same_text = other[1] == adapter and np.array_equal(other[0], ids)
            if not same_text and np.array_equal(other[2], vector) and np.isfinite(vector).all():
                self._last = None
                return [other[1], adapter]
        self._last = (texts[-1], adapters[-1], vectors[-1].copy())
        return []
