"""Runs ``gpu_kernel_cases.py`` with Triton, which is installed in a folder of its own.

Triton decides at its first import whether its interpreter runs the kernels, and its library prints
warnings when a process ends, so it is not in the environment of the other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full("the GPU kernels, run by Triton's interpreter")

ROOT = Path(__file__).parents[3]
TRITON = ROOT / ".cache" / "triton"


@pytest.mark.skipif(not TRITON.exists(), reason="needs Triton: make .cache/triton/stamp")
def test_the_kernels_equal_plain_torch(pytestconfig: pytest.Config) -> None:
    """Each kernel gives what the same operation in plain torch gives."""
    cases = Path(__file__).with_name("gpu_kernel_cases.py")
    wheel = pytestconfig.getoption("--wheel")
    options = ["-q", "-p", "no:cacheprovider", *([f"--wheel={wheel}"] if wheel else [])]
    paths = [str(TRITON), *filter(None, [os.environ.get("PYTHONPATH")])]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout
    assert "29 passed" in ran.stdout
