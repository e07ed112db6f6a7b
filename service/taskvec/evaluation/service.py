"""A running taskvec service as a model under evaluation, called over HTTP."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import aiohttp
import numpy as np
import orjson

from taskvec.concurrency import gather_or_cancel
from taskvec.errors import UnavailableError
from taskvec.evaluation.formats import Matrix
from taskvec.evaluation.models import Advance

KEY_VARIABLE = "TASKVEC_EVAL_KEY"
"""Environment variable with the service's API key; command lines are visible to all users."""

REQUEST_TEXTS, MAX_CONCURRENT_REQUESTS = 32, 4
MAX_ATTEMPTS = 10
"""Attempts of a request to a service that answers 429 or 503."""

_TIMEOUT_SECONDS = 300.0
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_MAX_RETRY_SECONDS = 30.0
"""Limit of a Retry-After header."""

_RAW = "application/octet-stream"


class ServedModel:
    """The model of a taskvec service, with any engine; see ``evaluation.models.Model``."""

    def __init__(self, url: str) -> None:
        """Request the model's name, dimensions and tasks.

        Args:
            url: the service's address, with or without /v1.

        Raises:
            UnavailableError: it does not answer, or is not a taskvec service.
        """
        self._url = url.rstrip("/").removesuffix("/v1")
        key = os.environ.get(KEY_VARIABLE)
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = asyncio.run(self._models())
        try:
            model = orjson.loads(answer)["data"][0]
            self.name = str(model["id"])
            self.dimension = int(model["dimensions"])
            self.matryoshka: Sequence[int] = [int(d) for d in model["matryoshka_dimensions"]]
            self.tasks: Sequence[str] = [str(task) for task in model["tasks"]]
        except (ValueError, LookupError, TypeError):
            raise UnavailableError(
                f"{self._url} is not a taskvec service: its /v1/models lists no tasks."
            ) from None

    def embed(self, texts: Sequence[str], task: str, advance: Advance) -> Matrix:
        """See ``Model.embed``.

        Raises:
            UnavailableError: the service does not answer, or answers with an error.
        """
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        asyncio.run(self._fill(vectors, texts, task, advance))
        return vectors

    async def _models(self) -> bytes:
        async with self._session() as session:
            _, answer = await self._exchange(session, "GET", "/v1/models")
            return answer

    async def _fill(
        self, vectors: Matrix, texts: Sequence[str], task: str, advance: Advance
    ) -> None:
        starts = iter(range(0, len(texts), REQUEST_TEXTS))

        async def work(session: aiohttp.ClientSession) -> None:
            for start in starts:  # shared: each worker takes the next one
                chunk = texts[start : start + REQUEST_TEXTS]
                vectors[start : start + len(chunk)] = await self._embed(session, chunk, task)
                advance(len(chunk))

        async with self._session() as session:
            await gather_or_cancel(work(session) for _ in range(MAX_CONCURRENT_REQUESTS))

    async def _embed(
        self, session: aiohttp.ClientSession, texts: Sequence[str], task: str
    ) -> Matrix:
        body = {
            "model": self.name,
            "input": texts,
            "task": task,
            "truncate": True,
            # A normalised vector that is truncated and normalised again differs in its last bits
            # from one that is normalised once: some int8 values would differ from the service's.
            "normalized": False,
        }
        headers, answer = await self._exchange(session, "POST", "/v1/embeddings", body)
        shape = headers.get("x-embedding-shape")
        if shape != f"{len(texts)},{self.dimension}" or len(answer) != 4 * len(texts) * (
            self.dimension
        ):
            raise UnavailableError(
                f"{self._url} did not send {len(texts)} vectors as bytes: is it a taskvec service?"
            )
        return np.frombuffer(answer, dtype="<f4").reshape(len(texts), self.dimension)

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers=self._headers, timeout=aiohttp.ClientTimeout(total=_TIMEOUT_SECONDS)
        )

    async def _exchange(
        self, session: aiohttp.ClientSession, method: str, path: str, body: Any = None
    ) -> tuple[Mapping[str, str], bytes]:
        """Return headers and body of a 200; retry while the service answers 429 or 503."""
        headers = {"content-type": "application/json", "accept": _RAW, "x-priority": "bulk"}
        data = None if body is None else orjson.dumps(body)
        attempts = 0
        while True:
            attempts += 1
            try:
                async with session.request(
                    method, self._url + path, data=data, headers=headers if data else None
                ) as response:
                    answer = await response.read()
            except TimeoutError:
                raise UnavailableError(
                    f"{self._url}{path} did not answer within {_TIMEOUT_SECONDS:.0f} seconds."
                ) from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise UnavailableError(
                    f"{self._url}{path} cannot be reached: {type(error).__name__}: {error}"
                ) from None
            if response.status == HTTPStatus.OK:
                return response.headers, answer
            if response.status not in _BUSY or attempts == MAX_ATTEMPTS:
                raise UnavailableError(self._error_message(path, response.status, answer))
            await asyncio.sleep(_seconds(response.headers.get("retry-after", "")))

    def _error_message(self, path: str, status: int, answer: bytes) -> str:
        try:
            message = str(orjson.loads(answer)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            message = answer[:200].decode(errors="replace")
        unauthorised = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        hint = f" Set {KEY_VARIABLE}." if unauthorised else ""
        return f"{self._url}{path} answers with status {status}: {message}{hint}"


def _seconds(retry_after: str) -> float:
    return min(float(retry_after), _MAX_RETRY_SECONDS) if retry_after.isdecimal() else 1.0
