"""`taskvec eval` on the default model and on a service."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heldout import write_all
from taskvec.checkpoint.open import DEFAULT_MODEL
from taskvec.cli.evaluate import EvalOptions, ModelSource, run_eval
from taskvec.core.output_format import OutputType
from taskvec.errors import TaskvecError

ADAPTERS = ["classification", "clustering", "retrieval", "text-matching"]
MEASURES = {
    "search": ["ndcg@10", "recall@10", "recall@100"],
    "pairs": ["spearman"],
    "topics": ["accuracy", "f1"],
    "topics/test": ["v_measure"],
    "groups": ["v_measure"],
}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny data set of each layout."""
    return write_all(tmp_path_factory.mktemp("data") / "held")


@pytest.fixture(scope="module")
def report(data: Path) -> dict[str, Any]:
    """Return the JSON, plot and printed tables for the default model, with default options."""
    files = data.parent / "report.json", data.parent / "report.png"
    done = run(
        "--data", data, "--baseline", "bm25", "--dtype", "float32",
        "--json", files[0], "--plot", files[1],
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    written = json.loads(files[0].read_bytes())
    assert isinstance(written, dict)
    return written | {"png": files[1].read_bytes(), "printed": done.stdout}


def test_every_task_is_measured_in_every_form(report: dict[str, Any]) -> None:
    """Results cover all data, adapters and the base, Matryoshka dimensions and output types."""
    rows = {
        (row["data"], row["task"], row["dimensions"], row["output"]): row
        for row in report["results"]
    }
    assert len(rows) == len(report["results"])
    formats = [(d, o) for d in (256, 128, 64, 32) for o in ("float", "int8", "binary")]
    asymmetric = [(d, "binary, float queries") for d in (256, 128, 64, 32)]
    expected = {("held/search", "bm25", None, "bm25")}
    for name in MEASURES:
        for task in [*ADAPTERS, "base"]:
            kinds = formats + asymmetric if name == "search" else formats
            expected |= {(f"held/{name}", task, *output_format) for output_format in kinds}
    assert set(rows) == expected
    for (name, _, _, _), row in rows.items():
        assert list(row["measures"]) == MEASURES[name.removeprefix("held/")]
        assert all(-1 <= value <= 1 for value in row["measures"].values())
    sizes = {row["output"]: row["bytes"] for row in report["results"] if row["dimensions"] == 64}
    assert sizes == {"float": 256, "int8": 64, "binary": 8, "binary, float queries": 8}


def test_scores_are_far_above_chance(report: dict[str, Any]) -> None:
    """Texts of three topics score far above chance in every measure, in int8 about the same."""
    best = {
        (row["data"].removeprefix("held/"), row["output"]): next(iter(row["measures"].values()))
        for row in report["results"]
        if row["dimensions"] == 256 and row["task"] == "retrieval"
    }
    assert best["search", "float"] > 0.6
    assert best["pairs", "float"] > 0.6
    assert best["topics", "float"] > 0.8
    assert best["groups", "float"] > 0.5
    for name in MEASURES:
        assert best[name, "int8"] == pytest.approx(best[name, "float"], abs=0.1)


def test_each_adapter_has_its_own_scores(report: dict[str, Any]) -> None:
    """No two tasks have the same score, so each ran with its own adapter."""
    figures = {
        row["task"]: row["measures"]["ndcg@10"]
        for row in report["results"]
        if row["data"] == "held/search" and row["output"] == "binary" and row["dimensions"] == 32
    }
    assert len(set(figures.values())) == len(ADAPTERS) + 1


def test_the_report_names_model_data_and_versions(report: dict[str, Any]) -> None:
    """The JSON names model, data, seed and versions; tables are printed; the plot is a PNG."""
    assert report["model"] == {"name": "taskvec-mini", "source": "taskvec-mini", "dimension": 256}
    assert [item["name"] for item in report["data"]] == [
        f"held/{name}" for name in sorted(MEASURES)
    ]
    assert report["seed"] == 0
    assert "scikit-learn" in report["libraries"]
    assert report["png"].startswith(PNG)
    for name, measures in MEASURES.items():
        assert f"held/{name}: {measures[0]} (" in report["printed"]
    assert "binary, float queries" in report["printed"]
    assert "[" not in report["printed"], "styles are not text"


def test_a_service_scores_as_its_model_does(
    data: Path, report: dict[str, Any], server_url: str, tmp_path: Path
) -> None:
    """Over HTTP the same tasks, without the base, have the same scores except for rounding."""
    file = tmp_path / "service.json"
    done = run(
        "--url", server_url, "--data", data / "search", "--data", data / "pairs.jsonl",
        "--task", "retrieval", "--task", "clustering", "--dimensions", "64", "--output", "float",
        "--json", file,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    written = json.loads(file.read_bytes())
    assert written["model"]["source"] == server_url
    mine = {(row["kind"], row["task"]): row["measures"] for row in written["results"]}
    truth = {
        (row["kind"], row["task"]): row["measures"]
        for row in report["results"]
        if (row["dimensions"], row["output"]) == (64, "float")
    }
    assert len(mine) == 4
    for key, measures in mine.items():
        assert measures == pytest.approx(truth[key], abs=0.05)


def test_scores_are_deterministic(data: Path, report: dict[str, Any], tmp_path: Path) -> None:
    """The same model, data and seed give exactly the same scores."""
    file = tmp_path / "again.json"
    done = run(
        "--data", data, "--task", "base", "--output", "int8", "--dtype", "float32", "--json", file
    )
    assert done.returncode == 0, done.stderr
    again = json.loads(file.read_bytes())["results"]
    first = [r for r in report["results"] if r["task"] == "base" and r["output"] == "int8"]
    assert again == first


@pytest.mark.parametrize(
    ("changes", "url", "message"),
    [
        ({"data": [Path("nowhere")]}, None, "nowhere does not exist"),
        ({"tasks": ["poetry"]}, None, "has no task 'poetry': choose from retrieval, "),
        ({"dimensions": [512]}, None, "--dimensions must be between 1 and 256"),
        ({"dimensions": [100]}, None, "multiple of 8"),
        ({"json": Path("no/folder/x.json")}, None, "no/folder/x.json cannot be written"),
        ({"plot": Path()}, None, "cannot be written"),
        ({}, "http://127.0.0.1:9", "http://127.0.0.1:9/v1/models cannot be reached"),
    ],
    ids=str,
)
def test_invalid_options_are_refused_at_once(
    data: Path, changes: dict[str, Any], url: str | None, message: str
) -> None:
    """Invalid paths, tasks and dimensions are refused before anything is embedded."""
    options = EvalOptions(
        data=[data], tasks=[], dimensions=[], outputs=[OutputType.BINARY], bm25=False,
        json=None, plot=None, seed=0,
    )  # fmt: skip
    source = ModelSource(DEFAULT_MODEL, url, None, "cpu", "auto")
    with pytest.raises(TaskvecError) as refused:
        run_eval(replace(options, **changes), source)
    assert message in refused.value.message


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--data", "nowhere"), 2, "nowhere does not exist"),
        (("--data", ".", "--model", "no-such-folder/"), 3, "no-such-folder"),
        (("--data", ".", "--output", "int4"), 2, "--output"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_sentence(
    data: Path, options: tuple[str, ...], code: int, message: str
) -> None:
    """Wrong usage gives the usual exit code and one sentence without a traceback."""
    done = run(*options, cwd=data)
    assert done.returncode == code, done.stderr
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


ABSENT = """
import sys
missing = sys.argv.pop(1)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from taskvec.cli.main import main
main()
"""
"""Code that runs the command as if a library, the first argument, were not installed."""


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("sklearn", "eval", "taskvec[eval]"),
        ("bm25s", "eval", "taskvec[eval]"),
        ("torch", "eval", "taskvec[packed]"),
        ("mteb", "eval-mteb", "taskvec[mteb]"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    data: Path, missing: str, command: str, extra: str
) -> None:
    """The error for a missing library names the extra that installs it."""
    arguments = ["--tasks", "x"] if command == "eval-mteb" else ["--data", str(data)]
    done = python(ABSENT, missing, command, *arguments)
    assert done.returncode == 3, done.stderr
    assert done.stderr == f"taskvec: This command needs {missing}: install {extra}.\n"


def test_a_service_is_evaluated_without_torch(data: Path, server_url: str) -> None:
    """Evaluating a service does not need torch."""
    done = python(ABSENT, "torch", "eval", "--data", data / "pairs.jsonl", "--url", server_url)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["sklearn", "scipy", "matplotlib", "bm25s", "mteb"])
def test_serving_needs_no_evaluation(module: str) -> None:
    """The command line and the service import none of the evaluation's libraries."""
    code = f"import sys, taskvec.cli.main, taskvec.api.app; sys.exit({module!r} in sys.modules)"
    assert python(code).returncode == 0


def run(*options: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m taskvec eval` with these options."""
    started = [sys.executable, "-m", "taskvec", "eval", *map(str, options)]
    return subprocess.run(
        started, capture_output=True, text=True, check=False, timeout=300, cwd=cwd
    )


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process."""
    started = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(started, capture_output=True, text=True, check=False, timeout=120)
