"""A running service, asked over HTTP as any client would."""

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
"""Where the service's API key is looked for: what a command line has, all can see."""

TEXTS_A_REQUEST, REQUESTS_AT_ONCE = 32, 4
ATTEMPTS = 10
"""Times that a request is sent to a service that has no room for it now."""

_SECONDS = 300.0
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_LONGEST_WAIT = 30.0
_RAW = "application/octet-stream"


class Service:
    """A taskvec service; whatever engine it has."""

    def __init__(self, url: str) -> None:
        """Ask what it serves.

        Args:
            url: its address, with or without /v1.

        Raises:
            UnavailableError: it does not answer, or not as a taskvec service does.
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
                f"{self._url} is no taskvec service: its /v1/models names no tasks."
            ) from None

    def embed(self, texts: Sequence[str], task: str, advance: Advance) -> Matrix:
        """See ``Model.embed``.

        Raises:
            UnavailableError: the service does not answer, or with an error; its sentence is told.
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
        begins = iter(range(0, len(texts), TEXTS_A_REQUEST))

        async def work(session: aiohttp.ClientSession) -> None:
            for begin in begins:  # shared: each worker takes the next one
                piece = texts[begin : begin + TEXTS_A_REQUEST]
                vectors[begin : begin + len(piece)] = await self._embed(session, piece, task)
                advance(len(piece))

        async with self._session() as session:
            await gather_or_cancel(work(session) for _ in range(REQUESTS_AT_ONCE))

    async def _embed(
        self, session: aiohttp.ClientSession, texts: Sequence[str], task: str
    ) -> Matrix:
        body = {
            "model": self.name,
            "input": texts,
            "task": task,
            "truncate": True,
            # The scaled vector, cut and scaled again, would differ in its last bits from the cut
            # one: then some values of int8 would be others than the service gives.
            "normalized": False,
        }
        headers, answer = await self._exchange(session, "POST", "/v1/embeddings", body)
        shape = headers.get("x-embedding-shape")
        if shape != f"{len(texts)},{self.dimension}" or len(answer) != 4 * len(texts) * (
            self.dimension
        ):
            raise UnavailableError(
                f"{self._url} sent no vectors as bytes for {len(texts)} texts: is it a taskvec "
                "service?"
            )
        return np.frombuffer(answer, dtype="<f4").reshape(len(texts), self.dimension)

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            headers=self._headers, timeout=aiohttp.ClientTimeout(total=_SECONDS)
        )

    async def _exchange(
        self, session: aiohttp.ClientSession, method: str, path: str, body: Any = None
    ) -> tuple[Mapping[str, str], bytes]:
        """Headers and body of a 200; while the service is full, it is asked again."""
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
                    f"{self._url}{path} gave no answer within {_SECONDS:.0f} seconds."
                ) from None
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise UnavailableError(
                    f"{self._url}{path} cannot be asked: {type(error).__name__}: {error}"
                ) from None
            if response.status == HTTPStatus.OK:
                return response.headers, answer
            if response.status not in _BUSY or attempts == ATTEMPTS:
                raise UnavailableError(self._complaint(path, response.status, answer))
            await asyncio.sleep(_seconds(response.headers.get("retry-after", "")))

    def _complaint(self, path: str, status: int, answer: bytes) -> str:
        try:
            said = str(orjson.loads(answer)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            said = answer[:200].decode(errors="replace")
        refused = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        cure = f" Put a key into {KEY_VARIABLE}." if refused else ""
        return f"{self._url}{path} answers with status {status}: {said}{cure}"


def _seconds(retry_after: str) -> float:
    return min(float(retry_after), _LONGEST_WAIT) if retry_after.isdecimal() else 1.0
