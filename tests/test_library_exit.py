"""Programs that never close their Embedder end, and say nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = (
    "from taskvec import Embedder\ne = Embedder('taskvec-mini')\n"
    "print(e.embed(['x']).shape, flush=True)\n"
)
PROGRAMS = {
    "script": ("", 0),
    "exception": ("raise SystemExit(5)", 5),
    "thread": (
        (
            "import threading\nt = threading.Thread(target=e.embed, args=(['y'],))\n"
            "t.start()\nt.join()"
        ),
        0,
    ),
    "forked child": (
        "import os, sys\npid = os.fork()\nif pid:\n    sys.exit(os.waitpid(pid, 0)[1])",
        0,
    ),
    "collected": (
        "import gc, threading\ndel e\ngc.collect()\nassert threading.active_count() == 1",
        0,
    ),
    "event loop": (  # as in a notebook, whose kernel runs one
        "import asyncio\nasync def main():\n    e.embed(['y'])\nasyncio.run(main())",
        0,
    ),
    "made in a thread": (
        (
            "import threading\ndef main():\n    global f\n    f = Embedder('taskvec-mini')\n"
            "    f.embed(['y'])\nt = threading.Thread(target=main)\nt.start()\nt.join()"
        ),
        0,
    ),
    "embedding in a daemon thread": (
        (
            "import threading, time\n"
            "texts = ['word ' * 500] * 2000\n"
            "threading.Thread(target=e.embed, args=(texts,), daemon=True).start()\ntime.sleep(1)"
        ),
        0,
    ),
    "much work in a daemon thread": (  # which has reached the engine, and takes a minute
        (
            "import threading, time\n"
            "texts = ['word ' * 1900] * 4000\n"
            "threading.Thread(target=e.embed, args=(texts,), daemon=True).start()\n"
            "while not e._engine._waiting.queue.texts:\n    time.sleep(0.01)\n"
            "time.sleep(0.5)"
        ),
        0,
    ),
    "multiprocessing": (
        (
            "import multiprocessing\nfork = multiprocessing.get_context('fork')\n"
            "p = fork.Process(target=len, args=('',))\np.start()\np.join()\n"
            "raise SystemExit(p.exitcode)"
        ),
        0,
    ),
    "forked child that fails": (
        (
            "import os, sys\npid = os.fork()\nif pid == 0:\n    try:\n        e.embed(['y'])\n"
            "    except RuntimeError:\n        sys.exit(7)\n"
            "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
        ),
        7,
    ),
}


START_ASYNC = (
    "import asyncio\nfrom taskvec import AsyncEmbedder\n"
    "e = AsyncEmbedder('taskvec-mini')\n"
    "async def shape():\n    return (await e.embed(['x'])).shape\n"
    "print(asyncio.run(shape()), flush=True)\n"
)
ASYNC_PROGRAMS = {
    "script": ("", 0),
    "exception": ("raise SystemExit(5)", 5),
    "another loop": ("assert asyncio.run(shape()) == (1, 256)", 0),
    "a loop that is never closed": (
        "loop = asyncio.new_event_loop()\nloop.run_until_complete(shape())",
        0,
    ),
    "a loop that is closed before the vectors come": (
        (
            "async def start():\n    loop.call_later(0.3, loop.stop)\n"
            "    global task\n    task = asyncio.ensure_future(e.embed(['word ' * 500] * 200))\n"
            "loop = asyncio.new_event_loop()\nloop.create_task(start())\nloop.run_forever()\n"
            "task.cancel()\nloop.run_until_complete(asyncio.wait([task]))\nloop.close()"
        ),
        0,
    ),
    "cancelled by the end of the loop": (
        (
            "async def main():\n    asyncio.create_task(e.embed(['word ' * 1900] * 4000))\n"
            "    await asyncio.sleep(1)\nasyncio.run(main())"
        ),
        0,
    ),
    "loading": (
        (
            "async def main():\n    f = AsyncEmbedder('taskvec-mini')\n"
            "    asyncio.create_task(f.load())\n    await asyncio.sleep(0.02)\n"
            "asyncio.run(main())"
        ),
        0,
    ),
    "starting": (
        (
            "async def main():\n    f = AsyncEmbedder('taskvec-mini')\n"
            "    asyncio.create_task(f.load())\n    while threading.active_count() < 6:\n"
            "        await asyncio.sleep(0.001)\n"
            "import threading\nasyncio.run(main())"
        ),
        0,
    ),
    "collected": (
        (
            "import gc, threading, time\ndel e\ngc.collect()\n"
            "until = time.monotonic() + 20\n"
            "while threading.active_count() > 1 and time.monotonic() < until:\n"
            "    time.sleep(0.01)\nassert threading.active_count() == 1"
        ),
        0,
    ),
    "forked child": (
        "import os, sys\npid = os.fork()\nif pid:\n    sys.exit(os.waitpid(pid, 0)[1])",
        0,
    ),
    "forked child that fails": (
        (
            "import os, sys\npid = os.fork()\nif pid == 0:\n    try:\n"
            "        asyncio.run(shape())\n    except RuntimeError:\n        sys.exit(7)\n"
            "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
        ),
        7,
    ),
}

KERNEL = """
import ast, asyncio, sys
async def run(cells):
    names = {}
    for cell in cells:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        answer = eval(compile(cell, "cell", "exec", flags), names)
        if answer is not None:
            await answer
asyncio.run(run(sys.argv[1:]))
"""
"""Runs cells in one event loop, in which they may await, as the kernel of a notebook does."""


@pytest.mark.parametrize(
    "cells",
    [
        [
            "from taskvec import Embedder",
            "e = Embedder('taskvec-mini')",
            "print(e.embed(['x']).shape)",
        ],
        [
            "from taskvec import AsyncEmbedder",
            "e = AsyncEmbedder('taskvec-mini')",
            "print((await e.embed(['x'])).shape)",
            "t = asyncio.ensure_future(e.embed(['word ' * 1900] * 4000))",
            "await asyncio.sleep(0.5)",
        ],
    ],
    ids=["blocking", "asynchronous"],
)
def test_a_notebook_ends_without_close(cells: list[str]) -> None:
    """Cells of a notebook that never closes its embedder work, and its kernel ends in silence."""
    done = subprocess.run(
        [sys.executable, "-c", KERNEL, "import asyncio", *cells],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 256)\n", "")


@pytest.mark.parametrize("kind", ASYNC_PROGRAMS)
def test_an_asynchronous_program_ends_without_close(kind: str) -> None:
    """A program with the asynchronous embedder ends with its own exit code, and says nothing."""
    more, code = ASYNC_PROGRAMS[kind]
    done = subprocess.run(
        [sys.executable, "-c", START_ASYNC + more],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "(1, 256)\n", "")


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_ends_without_close(kind: str) -> None:
    """The program ends with its own exit code and nothing on standard error."""
    more, code = PROGRAMS[kind]
    done = subprocess.run(
        [sys.executable, "-c", START + more],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "(1, 256)\n", "")


def test_a_program_ends_after_an_uncaught_exception() -> None:
    """The program ends with the traceback of its own exception, and nothing more."""
    done = subprocess.run(
        [sys.executable, "-c", START + "raise ValueError('mine')"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "(1, 256)\n")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "ValueError: mine"
    assert sum(line.startswith(("Traceback", "Exception")) for line in lines) == 1


def test_an_interactive_session_ends() -> None:
    """A session that reads statements one by one, as a notebook does, ends with its input."""
    done = subprocess.run(
        [sys.executable, "-i", "-q", "-c", START],
        input="e.embed(['y']).shape\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "(1, 256)\n(1, 256)\n")
    assert done.stderr.replace(">>>", "").strip() == ""
