"""Every script under loadtest/ still runs, so that each figure can be measured again."""

from __future__ import annotations

import ast
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import repository
from programs import program

pytestmark = pytest.mark.full("the load tests, each in a short form")

FOLDER = repository() / "loadtest"

SHORT = {
    "burst --rounds 1 --busy 0": "burst",
    "crowded --rounds 1 --busy 0 --ways passive --seconds 0.1": "crowded",
    "engine --shape mini --rounds 1 --mixed-texts 16": "engine-mini",
    "engine_process --rounds 1 --requests 5 --seconds 0.5": "engine-process",
    "gateway --rounds 1 --seconds 1": "gateway",
    "kills --seconds 8 --interval 3 --only gateways --name kills": "kills",
    "latency --starts 1 --requests 5": "latency",
    "load --seconds 1 --scenarios mixed --levels 0.5 --name load": "load",
    "overload --seconds 2 --rounds 1": "overload",
    "overload --texts 1 --times 1.2 --seconds 2 --rounds 1 --name single": "single",
    "own_time --rounds 1": "own-time",
    "parity": "parity",
    "remote --rounds 1 --seconds 1": "remote",
    "truncation --rounds 1": "truncation",
}
"""Commands and the results that they write."""

ELSEWHERE = {
    "fairness": "takes minutes",
    "tokenizing": "takes minutes",
    "hostile": "run by .ci/run, with bounds",
    "soak": "run by .ci/run, with bounds",
    "compare": "runs the scripts above in two checkouts",
    "peers": "needs infinity and vLLM",
    "versus_vllm": "needs vLLM",
    "vllm_side": "the part of versus_vllm in vLLM's environment",
    "merged": "the part of peers that writes a checkpoint",
    "null_server": "the part of remote that answers without a model",
}
"""Scripts that do not run here, with the reason."""


def scripts() -> set[str]:
    """Names of the files that do something when they are run."""
    return {
        file.stem
        for file in FOLDER.glob("*.py")
        if any(
            isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
            for node in ast.parse(file.read_text()).body
        )
    }


def test_every_script_is_known() -> None:
    """A script is run here, or there is a reason why it is not."""
    assert scripts() == {command.split()[0] for command in SHORT} | ELSEWHERE.keys()


@pytest.mark.parametrize("command", SHORT)
def test_it_measures(command: str, tmp_path: Path) -> None:
    """The script ends, and writes its result with figures."""
    name, *options = shlex.split(command)
    if name == "gateway":
        program("wrk")
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *options],
        cwd=repository(),
        env=os.environ | {"LOADTEST_RESULTS": str(tmp_path), "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    file = tmp_path / f"{SHORT[command]}.json"
    assert file.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(file.read_text())
    # A short form may break bounds on what only a long one can show.
    assert done.returncode == 0 or result.get("broken"), done.stderr[-2000:]
    assert result["machine"]
    assert len(result) > 3, "there are figures"


def python_path() -> str:
    """The folders of tests, which parity.py imports, before what is set already."""
    return os.pathsep.join(filter(None, [str(repository() / "tests"), os.getenv("PYTHONPATH")]))
