"""Measure tokenising: three ways to do it, and what a server's other clients see of an attack.

The ways, in one process with an event loop and without an engine: whole texts in threads
(``encode`` for one text, ``encode_batch_fast`` for several), slices in threads (``TextTokenizer``),
and requests in processes, in the order in which they come. The server is the built-in model's, on
this machine; its clients are threads of this process.

    python loadtest/tokenizing.py
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import random
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from report import spread, write_result
from server import free_port, wait_ready
from taskvec.checkpoint.open import DEFAULT_MODEL, open_checkpoint
from taskvec.core.tokenizer import TextTokenizer

THREADS = 2
HARD_WORD = "q" * 99 + "\u16a0 "
"""One token for which WordPiece makes 5,000 look-ups."""

QUERY = "How do I stop a running program in the shell?"
PAGE = "the quick brown fox jumps over the lazy dog. " * 40
HARD_TEXT = HARD_WORD * 1990
"""205 KB, which is one text of 1,990 tokens."""

REFUSED_TEXT = HARD_WORD * 3000
"""300 KB, more tokens than fit: it costs the tokenizer as much, and the engine nothing."""

HARD_BATCH = [HARD_WORD * 121] * 85
"""1 MB in 85 texts."""

ATTACKS = {
    "a text of 205 KB": HARD_TEXT,
    "a text that is refused": REFUSED_TEXT,
    "1 MB": HARD_BATCH,
}

Encode = Callable[[Sequence[str]], Awaitable[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds under each attack")
    options = parser.parse_args()
    ways = {"whole texts in threads": whole_texts, "slices in threads": slices_in_threads}
    ways["requests in processes"] = requests_in_processes
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            for figure, value in asyncio.run(way()).items():
                figures[name].setdefault(figure, []).append(value)
    served: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for figure, value in attacks(options.seconds).items():
            served.setdefault(figure, []).append(value)
    write_result(
        "tokenizing",
        {
            "ways": {
                name: {figure: spread(values, 2) for figure, values in rows.items()}
                for name, rows in figures.items()
            },
            "server": {figure: spread(values, 1) for figure, values in served.items()},
        },
    )


def tokenizer_here() -> TextTokenizer:
    """Return the built-in model's tokenizer."""
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    return TextTokenizer(
        checkpoint.tokenizer,
        max_tokens=checkpoint.card.max_tokens,
        vocabulary=checkpoint.card.vocabulary,
        threads=THREADS,
    )


async def whole_texts() -> dict[str, float]:
    """Measure the library called from threads, with whole texts."""
    tokenizer = Tokenizer.from_file(str(open_checkpoint(DEFAULT_MODEL).tokenizer))
    with ThreadPoolExecutor(THREADS) as pool:

        def work(texts: Sequence[str]) -> Any:
            if len(texts) == 1:
                encodings = [tokenizer.encode(texts[0])]
            else:
                encodings = tokenizer.encode_batch_fast(texts)
            return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

        return await measured(in_executor(pool, work))


async def slices_in_threads() -> dict[str, float]:
    """Measure the service's own way."""
    tokenizer = tokenizer_here()

    async def encode(texts: Sequence[str]) -> Any:
        return await tokenizer.encode(texts, prompt="", truncate=False)

    try:
        return await measured(encode)
    finally:
        tokenizer.close()


_in_process: dict[str, TextTokenizer] = {}
"""The tokenizer of a tokenizer process."""


def start_process() -> None:
    _in_process["tokenizer"] = tokenizer_here()


def encode_in_process(texts: Sequence[str]) -> Any:
    return _in_process["tokenizer"].encode_now(texts, prompt="", truncate=False)


async def requests_in_processes() -> dict[str, float]:
    """Measure processes that are sent texts and return ids."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(THREADS, context, initializer=start_process) as pool:
        encode = in_executor(pool, encode_in_process)
        await asyncio.gather(*(encode([QUERY]) for _ in range(8)))
        figures = await measured(encode)
        return {**figures, "memory of a process MB": memory(next(iter(pool._processes)))}  # noqa: SLF001


def in_executor(pool: Executor, work: Callable[[Sequence[str]], Any]) -> Encode:
    async def encode(texts: Sequence[str]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(pool, work, texts)

    return encode


async def measured(encode: Encode) -> dict[str, float]:
    """Return milliseconds, and texts a second, of one way to tokenise."""
    order = random.Random(1)
    words = ["the", "of", "and", "embedding", "in", "search", "question", "answer", "thorough"]
    bulk = [" ".join(order.choices(words, k=14)) for _ in range(2048)]
    await repeated(encode, [QUERY], 50)
    figures = {
        "query ms": median(await repeated(encode, [QUERY], 500)),
        "1,800 characters ms": median(await repeated(encode, [PAGE], 200)),
        "texts a second, 2,048 a request": 2048e3 / median(await repeated(encode, bulk, 8)),
    }
    for clients in (1, 4):
        attackers = [asyncio.create_task(endless(encode, [HARD_TEXT])) for _ in range(clients)]
        await asyncio.sleep(0.1)
        ticks, stop = lateness()
        began = time.perf_counter()
        queries, pages = [], []
        while time.perf_counter() - began < 1.5:
            queries += await repeated(encode, [QUERY], 3)
            pages += await repeated(encode, [PAGE], 1)
        stop.set()
        for task in attackers:
            task.cancel()
        await asyncio.gather(*attackers, return_exceptions=True)
        figures[f"beside {clients}: query ms"] = median(queries)
        figures[f"beside {clients}: 1,800 characters ms"] = median(pages)
        figures[f"beside {clients}: longest delay of the event loop ms"] = max(await ticks)
    return figures


def lateness() -> tuple[asyncio.Task[list[float]], asyncio.Event]:
    """Return the milliseconds by which a timer is late, until the event is set."""
    stop = asyncio.Event()

    async def tick() -> list[float]:
        late = []
        while not stop.is_set():
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            late.append((time.perf_counter() - due) * 1000)
        return late

    return asyncio.create_task(tick()), stop


async def repeated(encode: Encode, texts: Sequence[str], times: int) -> list[float]:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        await encode(texts)
        taken.append((time.perf_counter() - began) * 1000)
    return taken


async def endless(encode: Encode, texts: Sequence[str]) -> None:
    while True:
        await encode(texts)


def attacks(seconds: float) -> dict[str, float]:
    """Return milliseconds of small requests to a new server, alone and beside attackers."""
    port = free_port()
    command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port), "--no-log-requests"]
    figures = {}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_ready(port)
            clients(port, 1.0)
            figures |= {f"alone: {name}": value for name, value in clients(port, seconds).items()}
            for kind, text in ATTACKS.items():
                for number in (1, 4, 16):
                    with attackers(port, {"input": text}, number):
                        for name, value in clients(port, seconds).items():
                            figures[f"beside {number} x {kind}: {name}"] = value
        finally:
            server.terminate()
    return figures


def clients(port: int, seconds: float) -> dict[str, float]:
    """Return what ordinary clients see: a query, a text of 1,800 characters, a health check."""
    kinds = {
        "query": ("POST", "/v1/embeddings", {"input": QUERY}),
        "1,800 characters": ("POST", "/v1/embeddings", {"input": PAGE}),
        "/health/live": ("GET", "/health/live", None),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    until = time.perf_counter() + seconds

    def client(kind: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while time.perf_counter() < until:
            began = time.perf_counter()
            status = ask(connection, *kinds[kind])
            assert status == 200, (kind, status)
            times[kind].append((time.perf_counter() - began) * 1000)
            time.sleep(0.01)

    threads = [threading.Thread(target=client, args=(kind,)) for kind in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = {}
    for kind, taken in times.items():
        figures[f"{kind} p50 ms"] = median(taken)
        figures[f"{kind} p99 ms"] = float(np.percentile(taken, 99))
    return figures


@contextmanager
def attackers(port: int, body: dict[str, Any], number: int) -> Iterator[None]:
    """Send requests from some connections, each after the answer to the one before."""
    stop = threading.Event()

    def attack() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while not stop.is_set():
            ask(connection, "POST", "/v1/embeddings", body)

    threads = [threading.Thread(target=attack) for _ in range(number)]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: Any) -> int:
    data = None if body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status


def memory(process: int) -> float:
    """Return the resident memory of a process in MB."""
    (line,) = [
        line
        for line in Path(f"/proc/{process}/status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    return int(line.split()[1]) / 1024


def median(values: list[float]) -> float:
    return float(np.median(values))


if __name__ == "__main__":
    main()
