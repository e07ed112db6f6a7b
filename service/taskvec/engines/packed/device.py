"""Device, dtype, available cores and free memory of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from taskvec.cgroups import available_cores
from taskvec.concurrency import is_shortage
from taskvec.errors import StartError
from taskvec.memory_limits import MemoryLimits

OUT_OF_MEMORY = (
    "can't allocate memory",
    "could not create a primitive",
    "not enough memory",
    "ALLOC_FAILED",
    "bad_alloc",
    "out of memory",
)
"""Texts of out-of-memory errors that torch's allocators and libraries raise as RuntimeError; oneDNN
raises the one on a primitive when it cannot map its code."""

MAX_KERNELS = 256
"""Maximum number of kernels in oneDNN's caches. One kernel serves one matrix shape and takes 0.7 MB
with its descriptor. A busy service has about 430 shapes; creating a kernel takes about 0.6 ms."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def choose_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        StartError: the device does not exist.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise StartError(
            f"The device {name} does not exist: torch {torch.__version__} detects "
            f"{torch.cuda.device_count()} CUDA devices. Choose another --device, or install a "
            "torch build for CUDA and the driver."
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for a name; ``auto`` is bfloat16 if the device has instructions for it."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def forward_threads() -> int:
    """Return the threads of a forward pass: torch's count, at most the cores that are there."""
    return min(torch.get_num_threads(), available_cores())


def available_bytes(device: torch.device) -> int:
    """Return the free memory in bytes: the device's, or the machine's within the limits."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    tightest = MemoryLimits().tightest()
    return min(_machine_bytes(), tightest.free) if tightest else _machine_bytes()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the device or the process ran out of memory."""
    return (
        is_shortage(error)
        or isinstance(error, torch.OutOfMemoryError)
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY))
    )


def limit_kernel_cache() -> None:
    """Limit oneDNN's caches to ``MAX_KERNELS``, unless the environment sets another limit.

    Call it before the first matrix product of the process: the caches read the limit once.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # of oneDNN, of ideep
        os.environ.setdefault(cache, str(MAX_KERNELS))


def release_memory(device: torch.device) -> None:
    """Release memory that torch's allocator caches, so that smaller batches fit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _machine_bytes() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 62
    fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024
