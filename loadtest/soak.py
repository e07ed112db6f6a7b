"""Mixed traffic for a long time: does memory stay where it is, and is every answer what it should?

Single texts and thousands, all tasks and output types, wrong requests, wrong keys, clients that
leave, deadlines that pass, and a scrape of the metrics now and then; with API keys, limits, the
answer cache and log lines. The exit code is 1 where memory, threads or open files grow, or an
answer is not the expected one.

    python loadtest/soak.py --minutes 20
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson

from latency import resident_megabytes
from report import write_result
from server import free_port, wait_ready

SLOPE = 1.0
"""Megabytes in ten minutes by which resident memory may grow."""

MOST = 1200.0
"""Megabytes that a process may have after a run that is too short to judge a slope."""

LONG = 900.0
"""Seconds from which on a run is long enough: memory grows with every new shape of a batch, and it
takes ten minutes until most have been seen."""

MORE = 8
"""Threads or open files by which the second half may have more: connections come and go."""

CLIENTS = 6
EVERY = 2.0
"""Seconds between two looks at memory."""

SECRET = secrets.token_urlsafe(16)
KEY = {"authorization": f"Bearer {SECRET}"}
TASKS = ["retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification"]
TYPES = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
WORDS = "what grows slowly shows after hours in memory or threads or files or queues".split()  # noqa: SIM905


class Look(NamedTuple):
    """What a process takes; ``seconds`` since the traffic began."""

    seconds: float
    megabytes: float
    files: int
    threads: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--name", default="soak", help="of the result's file; - writes none")
    options = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.toml"
        digest = hashlib.sha256(SECRET.encode()).hexdigest()
        keys.write_text(
            f'[[keys]]\nname = "soak"\nsha256 = "{digest}"\n'
            "requests_per_minute = 1000000\ntokens_per_minute = 1000000000\nconcurrency = 64\n"
        )
        command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port)]
        command += ["--keys-file", str(keys), "--answer-cache-bytes", str(8 << 20)]
        with (
            (Path(folder) / "log").open("wb") as log,
            subprocess.Popen(command, stderr=log) as server,
        ):
            try:
                wait_ready(port)
                figures = asyncio.run(soak(port, server.pid, options.minutes * 60))
            finally:
                server.terminate()
    broken = figures["broken"]
    if options.name != "-":
        write_result(options.name, figures)
    else:
        print(orjson.dumps(figures, option=orjson.OPT_INDENT_2).decode())
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


async def soak(port: int, process: int, seconds: float) -> dict[str, Any]:
    """Traffic, and what the process takes meanwhile."""
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + seconds
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    looks: list[Look] = []

    async def client(number: int) -> None:
        dice = random.Random(number)
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < until:
                kind = dice.choices(list(KINDS), weights=[weight for weight, _ in KINDS.values()])
                expected, status = await KINDS[kind[0]][1](session, url, dice)
                outcomes[f"{kind[0]} {status}"] += 1
                if status not in expected and len(wrong) < 20:
                    wrong.append(f"{kind[0]}: {status}")

    async def look() -> None:
        begun = time.monotonic()
        while time.monotonic() < until:
            looks.append(look_at(process, time.monotonic() - begun))
            print(
                f"\r{looks[-1].seconds:6.0f} s {looks[-1].megabytes:6.1f} MB",
                end="",
                file=sys.stderr,
            )
            await asyncio.sleep(EVERY)
        print(file=sys.stderr)

    await asyncio.gather(look(), *(client(number) for number in range(CLIENTS)))
    warm = [entry for entry in looks if entry.seconds >= seconds / 3]
    slope = (
        600
        * statistics.linear_regression(
            [entry.seconds for entry in warm], [entry.megabytes for entry in warm]
        ).slope
    )
    most = max(entry.megabytes for entry in looks)
    broken = [*wrong]
    if seconds >= LONG and slope > SLOPE:
        broken.append(f"Memory grows by {slope:.2f} MB in ten minutes; {SLOPE} may be.")
    if seconds < LONG and most > MOST:
        broken.append(f"The process took {most:.0f} MB; {MOST:.0f} may be.")
    early, late = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    for name in ("files", "threads"):
        before = max(getattr(entry, name) for entry in early)
        after = max(getattr(entry, name) for entry in late)
        if after > before + MORE:
            broken.append(f"There are {after} {name}, there were {before}.")
    return {
        "seconds": seconds,
        "clients": CLIENTS,
        "outcomes": dict(sorted(outcomes.items())),
        "resident_megabytes": {
            "start": round(looks[0].megabytes, 1),
            "after_a_third": round(warm[0].megabytes, 1),
            "end": round(warm[-1].megabytes, 1),
            "most": round(most, 1),
        },
        "slope_megabytes_in_ten_minutes": round(slope, 2),
        "threads": looks[-1].threads,
        "open_files": looks[-1].files,
        "broken": broken,
    }


def look_at(process: int, seconds: float) -> Look:
    folder = Path(f"/proc/{process}")
    files, threads = (sum(1 for _ in (folder / name).iterdir()) for name in ("fd", "task"))
    return Look(seconds, resident_megabytes(process), files, threads)


def some_text(dice: random.Random, words: int) -> str:
    return " ".join(dice.choices(WORDS, k=words)) + f" {dice.random()}"


async def post(
    session: aiohttp.ClientSession,
    url: str,
    body: Any,
    headers: dict[str, str] | None = None,
    key: dict[str, str] = KEY,
) -> int:
    """The status of an answer that was read to its end."""
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    told = {"Content-Type": "application/json"} | key | (headers or {})
    async with session.post(f"{url}/v1/embeddings", data=content, headers=told) as answer:
        await answer.read()
        return answer.status


async def single(session: aiohttp.ClientSession, url: str, dice: random.Random) -> Any:
    body = {
        "input": some_text(dice, dice.randint(1, 60)),
        "task": dice.choice(TASKS),
        "dimensions": dice.choice([8, 64, 256]),
        "embedding_type": dice.choice(TYPES),
    }
    return {200}, await post(session, url, body)


async def again(session: aiohttp.ClientSession, url: str, dice: random.Random) -> Any:
    body = {"input": f"one of a hundred texts {dice.randrange(100)}", "task": dice.choice(TASKS)}
    return {200}, await post(session, url, body)


async def batch(session: aiohttp.ClientSession, url: str, dice: random.Random) -> Any:
    texts = [some_text(dice, dice.randint(1, 90)) for _ in range(dice.randint(2, 64))]
    raw = {"accept": "application/octet-stream"} if dice.random() < 0.3 else None
    return {200}, await post(session, url, {"input": texts, "task": dice.choice(TASKS)}, raw)


async def bulk(session: aiohttp.ClientSession, url: str, dice: random.Random) -> Any:
    texts = [some_text(dice, 12) for _ in range(1000)]
    return {200, 429}, await post(session, url, {"input": texts}, {"x-priority": "bulk"})


async def long_text(session: aiohttp.ClientSession, url: str, dice: random.Random) -> Any:
    body = {"input": some_text(dice, 30_000), "truncate": True}
    return {200}, await post(session, url, body)


async def wrong_body(session: aiohttp.ClientSession, url: str, dice: random.Random) -> Any:
    bodies: list[Any] = [b"{", b"[]", {"input": []}, {"input": "a", "dimensions": 0}]
    bodies += [{"input": "a", "task": "none"}, {"input": [1, 2]}, {"input": ["a", 7]}]
    return {400}, await post(session, url, dice.choice(bodies))


async def wrong_key(session: aiohttp.ClientSession, url: str, dice: random.Random) -> Any:
    return {401}, await post(session, url, {"input": "a"}, key={"api-key": str(dice.random())})


async def leaves(session: aiohttp.ClientSession, url: str, dice: random.Random) -> Any:
    texts = [some_text(dice, 40) for _ in range(500)]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(dice.uniform(0.005, 0.3)):
            return {200, 429}, await post(session, url, {"input": texts})
    return {499}, 499


async def too_late(session: aiohttp.ClientSession, url: str, dice: random.Random) -> Any:
    texts = [some_text(dice, 40) for _ in range(500)]
    headers = {"x-request-timeout-ms": str(dice.randint(1, 50))}
    return {504, 429, 200}, await post(session, url, {"input": texts}, headers)


async def metrics(session: aiohttp.ClientSession, url: str, _: random.Random) -> Any:
    async with session.get(f"{url}/metrics") as answer:
        await answer.read()
        return {200}, answer.status


KINDS = {
    "single": (60, single),
    "again": (15, again),
    "batch": (10, batch),
    "bulk": (0.3, bulk),
    "long": (0.5, long_text),
    "wrong body": (6, wrong_body),
    "wrong key": (3, wrong_key),
    "leaves": (1, leaves),
    "too late": (1, too_late),
    "metrics": (1, metrics),
}
"""Kinds of requests, how often each is sent, and how."""


if __name__ == "__main__":
    sys.exit(main())
