"""What the machine offers: device, number type, cores, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taskvec.checkpoint.checkpoint import Checkpoint
from taskvec.engines.base import EngineState
from taskvec.engines.packed.device import available_bytes, choose_device, choose_dtype
from taskvec.engines.packed.engine import PackedEngine, PackedOptions
from taskvec.errors import CheckpointError

CPU = torch.device("cpu")


def test_auto_takes_the_accelerator_where_there_is_one() -> None:
    """``auto`` is CUDA where torch sees it, else the processor."""
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device("auto").type == expected


def test_a_named_device_is_taken_as_named() -> None:
    """A name is obeyed even where ``auto`` would choose another device."""
    assert str(choose_device("cpu")) == "cpu"


@pytest.mark.anyio
@pytest.mark.parametrize("device", ["tpu", "cpu:x", "cuda:99"])
async def test_a_device_that_is_not_there_stops_the_start(
    default_checkpoint: Checkpoint, device: str
) -> None:
    """The failed start says that the device is to be checked, and leaves a dead engine."""
    engine = PackedEngine(default_checkpoint, PackedOptions(device=device))
    with pytest.raises(CheckpointError, match="--device"):
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
def test_a_named_number_type_is_taken_as_named(name: str, dtype: torch.dtype) -> None:
    """A name is obeyed whatever the processor is good at."""
    assert choose_dtype(name, CPU) is dtype


def test_auto_is_bfloat16_only_where_the_processor_multiplies_in_it() -> None:
    """Without such instructions bfloat16 would be slower than float32."""
    chosen = choose_dtype("auto", CPU)
    assert chosen in (torch.bfloat16, torch.float32)
    flags = processor_flags()
    if flags:
        native = bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
        assert (chosen is torch.bfloat16) == native


def test_available_memory_is_part_of_the_machines() -> None:
    """Some memory is left, and no more than there is."""
    left = available_bytes(CPU)
    assert 0 < left <= 1 << 62
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        total = next(line for line in meminfo.read_text().splitlines() if "MemTotal" in line)
        assert left <= int(total.split()[1]) * 1024


def processor_flags() -> set[str]:
    """Linux's names of what the processor can do; empty elsewhere."""
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


@pytest.mark.parametrize("said", [None, "300"])
def test_kernels_do_not_pile_up(said: str | None) -> None:
    """After some hundred shapes more of them take no more memory; what is set by hand stays."""
    environment = {k: v for k, v in os.environ.items() if k != "LRU_CACHE_CAPACITY"}
    environment |= {} if said is None else {"LRU_CACHE_CAPACITY": said}
    run = subprocess.run(
        [sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True, env=environment
    )
    grown, capacity = run.stdout.split()
    assert float(grown) < 130  # it would be 270
    assert capacity == (said or "256")
