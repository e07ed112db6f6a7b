"""The table of `make coverage`."""

from __future__ import annotations

from coverage_by_package import by_package


def test_files_are_summed_by_package() -> None:
    """Statements and branches count alike; folders below a package are packages of their own."""
    one = {"num_statements": 6, "covered_lines": 6, "num_branches": 4, "covered_branches": 2}
    none = {"num_statements": 2, "covered_lines": 0, "num_branches": 0, "covered_branches": 0}
    files = {
        "service/taskvec/errors.py": none,
        "/venv/lib/site-packages/taskvec/api/app.py": one,
        "service/taskvec/api/models.py": none,
        "service/taskvec/engines/packed/engine.py": one,
    }
    table = by_package({"files": {name: {"summary": summary} for name, summary in files.items()}})
    assert {name: round(covered.percent, 1) for name, covered in table.items()} == {
        "api": 66.7,
        "engines/packed": 80.0,
        "taskvec": 0.0,
    }
