"""Device, dtype, free memory and kernel caches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineState
from taskvec.engines.packed.device import (
    available_bytes,
    choose_device,
    choose_dtype,
    is_out_of_memory,
)
from taskvec.engines.packed.engine import PackedEngine, PackedOptions
from taskvec.errors import StartError

CPU = torch.device("cpu")


def test_auto_prefers_cuda() -> None:
    """``auto`` is CUDA if torch detects a device, otherwise the CPU."""
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device("auto").type == expected


def test_a_named_device_is_used() -> None:
    """A named device is used even if ``auto`` is another one."""
    assert str(choose_device("cpu")) == "cpu"


@pytest.mark.anyio
@pytest.mark.parametrize("device", ["tpu", "cpu:x", "cuda:99"])
async def test_a_missing_device_fails_the_start(
    default_checkpoint: Checkpoint, device: str
) -> None:
    """The error of the start names the option, and the engine is dead."""
    engine = PackedEngine(default_checkpoint, PackedOptions(device=device))
    with pytest.raises(StartError, match="--device"):
        await engine.start()
    assert engine.health().state is EngineState.DEAD


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float32", torch.float32),
    ],
)
def test_a_named_dtype_is_used(name: str, dtype: torch.dtype) -> None:
    """A named dtype is used even if the CPU is slow with it."""
    assert choose_dtype(name, CPU) is dtype


def test_auto_is_bfloat16_only_with_native_instructions() -> None:
    """``auto`` is bfloat16 exactly if the CPU has instructions for it."""
    chosen = choose_dtype("auto", CPU)
    assert chosen in (torch.bfloat16, torch.float32)
    flags = processor_flags()
    if flags:
        native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
        assert (chosen is torch.bfloat16) == native


def test_available_memory_is_at_most_the_total() -> None:
    """The free memory is positive and at most the memory of the machine."""
    left = available_bytes(CPU)
    assert 0 < left <= 1 << 62
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        total = next(line for line in meminfo.read_text().splitlines() if "MemTotal" in line)
        assert left <= int(total.split()[1]) * 1024


def processor_flags() -> set[str]:
    """Return the CPU flags from Linux; empty on other systems."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return set()
    lines = [line for line in cpuinfo.read_text().splitlines() if line[:5] in ("flags", "Featu")]
    return set(lines[0].split(":", 1)[1].split()) if lines else set()


SHAPES = """
import os, torch
from torch.nn.functional import linear
from taskvec.engines.packed.device import limit_kernel_cache

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

limit_kernel_cache()
weight = torch.ones(64, 64, dtype=torch.bfloat16)
def products(first, last):
    for rows in range(first, last):
        linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
    return resident()

kept = products(1, 400)
print(products(400, 800) - kept, os.environ["LRU_CACHE_CAPACITY"])
"""


@pytest.mark.parametrize("capacity_set", [None, "300"])
def test_the_kernel_cache_is_limited(capacity_set: str | None) -> None:
    """Memory does not grow with the number of shapes, and the environment overrides the limit."""
    environment = {k: v for k, v in os.environ.items() if k != "LRU_CACHE_CAPACITY"}
    environment |= {} if capacity_set is None else {"LRU_CACHE_CAPACITY": capacity_set}
    run = subprocess.run(
        [sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True, env=environment
    )
    grown, capacity = run.stdout.split()
    assert float(grown) < 130  # without a limit it is 270
    assert capacity == (capacity_set or "256")


@pytest.mark.parametrize(
    ("error", "shortage"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_errors_of_a_lack_of_memory(error: Exception, shortage: bool) -> None:
    """Errors of allocations and of threads that cannot be started are shortages of memory."""
    assert is_out_of_memory(error) is shortage
