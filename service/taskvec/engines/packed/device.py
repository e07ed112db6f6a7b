"""What the machine offers: device, number type, cores, free memory."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from taskvec.errors import CheckpointError

CGROUP = Path("/sys/fs/cgroup")
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "ALLOC_FAILED", "out of memory")
"""What torch's allocators and libraries say in errors that have no class of their own."""

MOST_KERNELS = 256
"""Kernels that oneDNN keeps, each for one shape of a product, with what describes it: 0.7 MB. A
busy service comes to some 430 shapes; each costs some 0.6 ms when it is not there."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(wanted: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        CheckpointError: it is not there.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(
            f"There is no device {wanted}: torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices. Choose another --device, or install a "
            "torch build for CUDA and the driver."
        )
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The number type for ``auto`` or a name: bfloat16 where the processor multiplies in it."""
    if wanted != "auto":
        return DTYPES[wanted]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    offers = torch.cpu.get_capabilities()
    native = any(offers.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def available_cores() -> int:
    """Cores that this process may use: torch's count, within the cgroup's quota of time."""
    return math.ceil(min(torch.get_num_threads(), _cgroup_cores()))


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken: the device's, or the machine's within the cgroup limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_machine_bytes(), _cgroup_bytes())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a forward failed for want of memory, on the device or in this process."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(said in str(error) for said in OUT_OF_MEMORY)
    )


def bound_kernels() -> None:
    """Let oneDNN keep ``MOST_KERNELS``, where the environment says nothing else.

    Has an effect before the process's first product only: both caches read it once.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # oneDNN's, ideep's
        os.environ.setdefault(cache, str(MOST_KERNELS))


def release_memory(device: torch.device) -> None:
    """Give back what torch keeps for later, so that smaller pieces fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _machine_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _cgroup_cores() -> float:
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return math.inf
    return math.inf if quota == "max" else int(quota) / int(period)


def _cgroup_bytes() -> int:
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        statistics = (CGROUP / "memory.stat").read_text().splitlines()
        used -= int(dict(line.split() for line in statistics)["inactive_file"])  # page cache
    except (OSError, ValueError, KeyError):
        return 1 << 62
    return 1 << 62 if limit == "max" else max(0, int(limit) - used)
