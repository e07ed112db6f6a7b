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
