"""Print the coverage of each package of the service, from the combined data of `make coverage`."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path, PurePath
from typing import NamedTuple

import coverage


class Covered(NamedTuple):
    """Coverage of the files of one package."""

    statements: int
    statements_run: int
    branches: int
    branches_taken: int

    @property
    def percent(self) -> float:
        """Statements and branches that ran, as in coverage's own total."""
        possible = self.statements + self.branches
        return 100 * (self.statements_run + self.branches_taken) / possible if possible else 100.0


def by_package(report: dict[str, dict[str, dict[str, dict[str, int]]]]) -> dict[str, Covered]:
    """Sum coverage's JSON report by package; `engines/packed` is another one than `engines`."""
    sums: dict[str, Counter[str]] = {}
    for file, entry in report["files"].items():
        parts = PurePath(file).parts
        inside = parts[len(parts) - parts[::-1].index("taskvec") : -1]
        sums.setdefault("/".join(inside) or "taskvec", Counter()).update(
            {name: n for name, n in entry["summary"].items() if isinstance(n, int)}
        )
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    return {package: Covered(*(s[name] for name in names)) for package, s in sorted(sums.items())}


def main() -> None:
    """Read the data file that coverage is configured to write, and print the table."""
    measured = coverage.Coverage()
    measured.load()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        measured.json_report(outfile=file.name)
        report = json.loads(Path(file.name).read_bytes())
    print(f"{'package':20} {'statements':>10} {'branches':>10} {'covered':>10}")
    for package, covered in by_package(report).items():
        print(
            f"{package:20} {covered.statements:10} {covered.branches:10} {covered.percent:8.1f} %"
        )


if __name__ == "__main__":
    main()
