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
