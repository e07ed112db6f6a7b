"""Soak test: run mixed traffic for a long time and check memory, threads, files and responses.

Sends single texts and thousands, all tasks and output types, invalid requests, wrong API keys,
requests whose client disconnects or whose deadline passes, and scrapes the metrics. The server runs
with API keys, limits, the answer cache and log lines. Exits with 1 if memory, threads or open files
grow, if a response is unexpected, if a request is lost, or if the server ends.

With a limit on the server's memory, and attackers who try to exceed it:

    python loadtest/soak.py --minutes 20
    python loadtest/soak.py --minutes 2 --attackers 16 --cgroup-memory 1200 --name soak-cgroup
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import multiprocessing
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import orjson

from hostile import run_attackers
from latency import resident_megabytes
from limited import limited_memory
from report import write_result
from server import free_port, pauses_of, wait_ready

MAX_SLOPE = 1.0
"""Maximum growth of resident memory in megabytes per ten minutes."""

MAX_MEGABYTES = 1200.0
"""Maximum resident memory in megabytes in a run that is too short to measure a slope."""

SLOPE_MIN_SECONDS = 900.0
"""Minimum duration to measure a slope: memory grows with each new shape of a batch, and most shapes
have occurred after ten minutes."""

MAX_MEGABYTES_ATTACKED = 900.0
"""Maximum resident memory in megabytes beside attackers."""

MAX_INCREASE = 8
"""Maximum increase of threads or open files in the second half; connections come and go."""

ATTACKS = [
    "2,048 texts, 25 MB, refused",
    "30 MB of a body, not finished",
    "answers of 6 MB, not read",
]
"""Attacks on memory of ``hostile.py``; the attackers are divided between them."""

PAUSES_INTERVAL = 20.0
"""Seconds between two readings of the longest pauses, which are of the last minute."""

CLIENTS = 6
SAMPLE_INTERVAL = 2.0
"""Seconds between two samples of the process."""

SECRET, ATTACKER = secrets.token_urlsafe(16), secrets.token_urlsafe(16)
KEY = {"authorization": f"Bearer {SECRET}"}
TASKS = ["retrieval.query", "retrieval.passage", "text-matching", "clustering", "classification"]
TYPES = ["float", "int8", "uint8", "binary", "ubinary", "base64"]
WORDS = "what grows slowly shows after hours in memory or threads or files or queues".split()  # noqa: SIM905


class Sample(NamedTuple):
    """Resources of the process, ``seconds`` after the start of the traffic."""

    seconds: float
    megabytes: float
    files: int
    threads: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--name", default="soak", help="name of the result file; - writes none")
    parser.add_argument("--address-space", type=int, metavar="MB", help="ulimit -v of the server")
    parser.add_argument("--cgroup-memory", type=int, metavar="MB", help="limit of its cgroup")
    parser.add_argument("--attackers", type=int, default=0, help="clients with a key of their own")
    options = parser.parse_args()
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        limited_memory(options.address_space, options.cgroup_memory) as enter,
    ):
        keys = Path(folder) / "keys.toml"
        keys.write_text(key_lines("soak", SECRET) + key_lines("attacker", ATTACKER))
        command = [sys.executable, "-m", "taskvec", "serve", "--port", str(port)]
        command += ["--keys-file", str(keys), "--answer-cache-bytes", str(8 << 20)]
        with (
            (Path(folder) / "log").open("wb") as log,
            subprocess.Popen(command, stderr=log, preexec_fn=enter) as server,  # noqa: PLW1509 - limits
        ):
            try:
                wait_ready(port, process=server)
                with attacking(port, options.attackers) as answers:
                    figures = asyncio.run(
                        soak(port, server, options.minutes * 60, attacked=bool(options.attackers))
                    )
                figures["attackers"] = {name: dict(seen) for name, seen in answers.items()}
            finally:
                server.terminate()
        figures |= read_log((Path(folder) / "log").read_text())
    figures |= {"address_space_mb": options.address_space, "cgroup_mb": options.cgroup_memory}
    broken = figures["broken"]
    if options.name != "-":
        write_result(options.name, figures)
    else:
        print(orjson.dumps(figures, option=orjson.OPT_INDENT_2).decode())
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken else 0


def key_lines(name: str, secret: str) -> str:
    """Return the lines of an API key in a keys file."""
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return (
        f'[[keys]]\nname = "{name}"\nsha256 = "{digest}"\n'
        "requests_per_minute = 1000000\ntokens_per_minute = 1000000000\nconcurrency = 64\n"
    )


@contextlib.contextmanager
def attacking(port: int, attackers: int) -> Iterator[dict[str, Any]]:
    """Run attackers in processes of their own; yields their answers, filled at the end."""
    context = multiprocessing.get_context("spawn")
    answers: dict[str, Any] = {}
    if not attackers:
        yield answers
        return
    stop = context.Event()
    with context.Manager() as manager:
        found = {name: manager.dict() for name in ATTACKS}
        headers = {"headers": f"Authorization: Bearer {ATTACKER}\r\n"}
        processes = [
            context.Process(
                target=run_attackers,
                args=(port, name, -(-attackers // len(ATTACKS)), stop, found[name]),
                kwargs=headers,
                daemon=True,
            )
            for name in ATTACKS
        ]
        for process in processes:
            process.start()
        try:
            yield answers
        finally:
            stop.set()
            for process in processes:
                process.join(30)
            answers |= {name: dict(seen) for name, seen in found.items()}


def read_log(log: str) -> dict[str, Any]:
    """Count the lines of memory pressure by what was refused from then on, and those of errors."""
    lines = [orjson.loads(line) for line in log.splitlines() if line.startswith("{")]
    pressure = Counter(line["refused"] for line in lines if line["event"] == "memory_pressure")
    errors = Counter(
        f"{line['event']} {str(line.get('exception', line.get('reason', '')))[-100:]}".strip()
        for line in lines
        if line.get("level") == "error"
    )
    return {"memory_pressure": dict(pressure), "errors": dict(errors)}


async def soak(
    port: int, server: subprocess.Popen[bytes], seconds: float, *, attacked: bool
) -> dict[str, Any]:
    """Send traffic, sample the process, and check the thresholds."""
    process = server.pid
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + seconds
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    samples: list[Sample] = []

    async def client(number: int) -> None:
        rng = random.Random(number)
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < until:
                kind = rng.choices(list(KINDS), weights=[weight for weight, _ in KINDS.values()])
                try:
                    expected, status = await KINDS[kind[0]][1](session, url, rng)
                except aiohttp.ClientError as error:
                    expected, status = set(), type(error).__name__
                    await asyncio.sleep(0.1)
                if attacked:  # the memory may be short for a moment
                    expected = expected | {429}
                outcomes[f"{kind[0]} {status}"] += 1
                if status not in expected and len(wrong) < 20:
                    wrong.append(f"{kind[0]}: {status}")

    async def take_samples() -> None:
        started = time.monotonic()
        while time.monotonic() < until and server.poll() is None:
            samples.append(take_sample(process, time.monotonic() - started))
            print(
                f"\r{samples[-1].seconds:6.0f} s {samples[-1].megabytes:6.1f} MB",
                end="",
                file=sys.stderr,
            )
            await asyncio.sleep(SAMPLE_INTERVAL)
        print(file=sys.stderr)

    clients = [client(number) for number in range(CLIENTS)]
    pauses, *_ = await asyncio.gather(watch_pauses(url, until), take_samples(), *clients)
    warm = warm_samples(samples, seconds)
    broken = [*wrong, *broken_limits(samples, seconds, attacked=attacked)]
    if server.poll() is not None:
        broken.append(f"The server ended with code {server.returncode}.")
    return {
        "seconds": seconds,
        "clients": CLIENTS,
        "outcomes": dict(sorted(outcomes.items())),
        "resident_megabytes": {
            "start": round(samples[0].megabytes, 1),
            "after_a_third": round(warm[0].megabytes, 1),
            "end": round(warm[-1].megabytes, 1),
            "most": round(max(sample.megabytes for sample in samples), 1),
        },
        "slope_megabytes_in_ten_minutes": round(slope_of(warm), 2),
        **pauses,
        "threads": samples[-1].threads,
        "open_files": samples[-1].files,
        "broken": broken,
    }


async def watch_pauses(url: str, until: float) -> dict[str, float]:
    """Return the longest pauses until a time, see ``server.longest_pauses``."""
    pauses: dict[str, float] = {}
    async with aiohttp.ClientSession() as session:
        while time.monotonic() < until:
            await asyncio.sleep(min(PAUSES_INTERVAL, max(0.0, until - time.monotonic() - 1)))
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{url}/metrics", headers=KEY) as page:
                    for name, value in pauses_of(await page.text()).items():
                        pauses[name] = max(value, pauses.get(name, 0.0))
            await asyncio.sleep(1)
    return pauses


def warm_samples(samples: list[Sample], seconds: float) -> list[Sample]:
    """Return the samples after the first third of a run."""
    return [sample for sample in samples if sample.seconds >= seconds / 3] or samples[-1:]


def slope_of(samples: list[Sample]) -> float:
    """Return the growth of memory in megabytes per ten minutes."""
    if len(samples) < 2:
        return 0.0
    return (
        600
        * statistics.linear_regression(
            [sample.seconds for sample in samples], [sample.megabytes for sample in samples]
        ).slope
    )


def broken_limits(samples: list[Sample], seconds: float, *, attacked: bool) -> list[str]:
    """Return a sentence for each limit on memory, files and threads that was exceeded."""
    broken = []
    warm = warm_samples(samples, seconds)
    peak, slope = max(sample.megabytes for sample in samples), slope_of(warm)
    limit = MAX_MEGABYTES_ATTACKED if attacked else MAX_MEGABYTES
    if seconds >= SLOPE_MIN_SECONDS and slope > MAX_SLOPE and not attacked:
        broken.append(f"Memory grows by {slope:.2f} MB per ten minutes; the limit is {MAX_SLOPE}.")
    if (seconds < SLOPE_MIN_SECONDS or attacked) and peak > limit:
        broken.append(f"The process used {peak:.0f} MB; the limit is {limit:.0f}.")
    early, late = warm[: len(warm) // 2], warm[len(warm) // 2 :]
    # The attackers' connections come and go.
    for name in () if attacked or not early else ("files", "threads"):
        before = max(getattr(sample, name) for sample in early)
        after = max(getattr(sample, name) for sample in late)
        if after > before + MAX_INCREASE:
            broken.append(f"The number of {name} grew from {before} to {after}.")
    return broken


def take_sample(process: int, seconds: float) -> Sample:
    """Read memory, open files and threads of a process from /proc."""
    folder = Path(f"/proc/{process}")
    files, threads = (sum(1 for _ in (folder / name).iterdir()) for name in ("fd", "task"))
    return Sample(seconds, resident_megabytes(process), files, threads)


def some_text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words)) + f" {rng.random()}"


async def post(
    session: aiohttp.ClientSession,
    url: str,
    body: Any,
    headers: dict[str, str] | None = None,
    key: dict[str, str] = KEY,
) -> int:
    """Send a request, read the whole response and return its status."""
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    sent = {"Content-Type": "application/json"} | key | (headers or {})
    async with session.post(f"{url}/v1/embeddings", data=content, headers=sent) as answer:
        await answer.read()
        return answer.status


async def single(session: aiohttp.ClientSession, url: str, rng: random.Random) -> Any:
    body = {
        "input": some_text(rng, rng.randint(1, 60)),
        "task": rng.choice(TASKS),
        "dimensions": rng.choice([8, 64, 256]),
        "embedding_type": rng.choice(TYPES),
    }
    return {200}, await post(session, url, body)


async def again(session: aiohttp.ClientSession, url: str, rng: random.Random) -> Any:
    body = {"input": f"one of a hundred texts {rng.randrange(100)}", "task": rng.choice(TASKS)}
    return {200}, await post(session, url, body)


async def batch(session: aiohttp.ClientSession, url: str, rng: random.Random) -> Any:
    texts = [some_text(rng, rng.randint(1, 90)) for _ in range(rng.randint(2, 64))]
    raw = {"accept": "application/octet-stream"} if rng.random() < 0.3 else None
    return {200}, await post(session, url, {"input": texts, "task": rng.choice(TASKS)}, raw)


async def bulk(session: aiohttp.ClientSession, url: str, rng: random.Random) -> Any:
    texts = [some_text(rng, 12) for _ in range(1000)]
    return {200, 429}, await post(session, url, {"input": texts}, {"x-priority": "bulk"})


async def long_text(session: aiohttp.ClientSession, url: str, rng: random.Random) -> Any:
    body = {"input": some_text(rng, 30_000), "truncate": True}
    return {200}, await post(session, url, body)


async def wrong_body(session: aiohttp.ClientSession, url: str, rng: random.Random) -> Any:
    bodies: list[Any] = [b"{", b"[]", {"input": []}, {"input": "a", "dimensions": 0}]
    bodies += [{"input": "a", "task": "none"}, {"input": [1, 2]}, {"input": ["a", 7]}]
    return {400}, await post(session, url, rng.choice(bodies))


async def wrong_key(session: aiohttp.ClientSession, url: str, rng: random.Random) -> Any:
    return {401}, await post(session, url, {"input": "a"}, key={"api-key": str(rng.random())})


async def leaves(session: aiohttp.ClientSession, url: str, rng: random.Random) -> Any:
    texts = [some_text(rng, 40) for _ in range(500)]
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(rng.uniform(0.005, 0.3)):
            return {200, 429}, await post(session, url, {"input": texts})
    return {499}, 499


async def too_late(session: aiohttp.ClientSession, url: str, rng: random.Random) -> Any:
    texts = [some_text(rng, 40) for _ in range(500)]
    headers = {"x-request-timeout-ms": str(rng.randint(1, 50))}
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
"""Kind of a request -> its weight, and the function that sends it.

Each function returns the expected statuses and the actual one.
"""


if __name__ == "__main__":
    sys.exit(main())
