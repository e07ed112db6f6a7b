"""Engine servers that take almost no CPU time, to measure the gateway in front of them.

They answer a gateway's probes with the golden vectors, and all other requests with prepared bytes.

    python loadtest/null_server.py vllm --port 9000 --model FOLDER
    python loadtest/null_server.py taskvec --uds /tmp/engine.sock --model FOLDER
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import uvicorn

from taskvec.api.app import create_app
from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.checkpoint.golden import GoldenVectors, golden_vectors
from taskvec.checkpoint.open import open_checkpoint
from taskvec.core.admission import NO_LIMIT
from taskvec.engines.base import EngineHealth, EngineResult, EngineState, TokenBatch
from taskvec.service import build_service
from taskvec.settings import Settings, TokenInput
from taskvec.telemetry.logs import configure_logs

MAX_TEXTS = 2048


class NullEngine:
    """Engine that returns prepared vectors at once."""

    def __init__(self, checkpoint: Checkpoint, golden: GoldenVectors) -> None:
        self.model = checkpoint.card
        self.finished = 0
        self.batch_tokens = 16_384
        random = np.random.default_rng(0)
        self._vectors = random.standard_normal((MAX_TEXTS, self.model.dimension), np.float32)
        self._golden = {
            (adapter, probe.tobytes()): vector
            for adapter, vectors in golden.vectors.items()
            for probe, vector in zip(golden.probes, vectors, strict=True)
        }

    async def start(self) -> None:
        pass

    async def embed(self, batch: TokenBatch) -> EngineResult:
        self.finished += len(batch.ids)
        return EngineResult(self.answer(batch.ids, batch.adapter), 0.0, 0.0)

    def answer(self, ids: Any, adapter: str | None) -> Any:
        known = self._golden.get((adapter, ids[0].tobytes()))
        if known is None:
            return self._vectors[: len(ids)]
        return np.stack([self._golden[adapter, text.tobytes()] for text in ids])

    async def stop(self) -> None:
        pass

    def health(self) -> EngineHealth:
        return EngineHealth(EngineState.READY)


class NullVllm:
    """The routes of vLLM's OpenAI server that a gateway calls, as a bare ASGI application."""

    def __init__(self, engine: NullEngine) -> None:
        self._engine = engine
        card = engine.model
        entries: list[dict[str, Any]] = [
            {"id": "base", "owned_by": "vllm", "max_model_len": card.max_tokens, "parent": None}
        ]
        entries += [{"id": name, "owned_by": "vllm", "parent": "base"} for name in card.adapters]
        self._models = orjson.dumps({"object": "list", "data": entries})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        content = self._models
        if scope["path"] == "/v1/embeddings":
            request = orjson.loads(body)
            ids = [np.array(text, dtype=np.int32) for text in request["input"]]
            adapter = None if request["model"] == "base" else request["model"]
            content = self._engine.answer(ids, adapter).tobytes()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": content})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("vllm", "taskvec"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--port", type=int)
    parser.add_argument("--uds")
    options = parser.parse_args()
    configure_logs("error")
    checkpoint = open_checkpoint(options.model)
    engine = NullEngine(checkpoint, golden_vectors(checkpoint, options.cache))
    app: Any = NullVllm(engine)
    if options.kind == "taskvec":
        settings = Settings(
            token_input=TokenInput.ACCEPT,
            max_queue_tokens=NO_LIMIT,
            max_queue_requests=NO_LIMIT,
            log_requests=False,
        )
        service = build_service(settings, checkpoint=checkpoint, engine=engine)
        app = create_app(service, print)
    address = {"uds": options.uds} if options.uds else {"port": options.port}
    uvicorn.run(app, log_config=None, access_log=False, **address)


if __name__ == "__main__":
    main()
