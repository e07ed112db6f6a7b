"""The public checks: schema, pins, permissions, and no truth of their own beside .ci/run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import repository

FOLDER = repository() / ".github"
FILES = sorted((FOLDER / "workflows").iterdir())
FLOWS = {file.stem: yaml.safe_load(file.read_text()) for file in FILES}
JOBS = {f"{flow}/{name}": job for flow, it in FLOWS.items() for name, job in it["jobs"].items()}
STEPS = [step for job in JOBS.values() for step in job.get("steps", [])]
MAKEFILE = (repository() / "Makefile").read_text()
PUBLISHES = {"contents": "read", "packages": "write", "id-token": "write", "attestations": "write"}


def said(tool: str, *arguments: str | Path) -> tuple[int, str]:
    """The exit code of a tool of this environment, and what it printed."""
    program = Path(sys.executable).with_name(tool)
    assert program.is_file(), f"{tool} is not installed: pip install -r requirements/dev.txt"
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("schema", "files"),
    [("github-workflows", FILES), ("dependabot", [FOLDER / "dependabot.yml"])],
    ids=["workflows", "dependabot"],
)
def test_they_follow_github_s_schemas(schema: str, files: list[Path]) -> None:
    """GitHub would read each file."""
    code, output = said("check-jsonschema", "--builtin-schema", f"vendor.{schema}", *files)
    assert code == 0, output


def test_zizmor_is_content() -> None:
    """The auditor of workflows finds nothing, without an exception."""
    code, output = said("zizmor", "--offline", "--no-progress", FOLDER)
    assert code == 0, output
    assert "zizmor: ignore" not in "".join(file.read_text() for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_actions_are_pinned(file: Path) -> None:
    """Each is a commit, with the version that it is beside it; or a workflow of ours."""
    uses = re.findall(r"^ *(?:- )?uses: (.*)$", file.read_text(), re.MULTILINE)
    assert uses
    for action in uses:
        own = action.removeprefix("$/")
        pinned = re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
        assert pinned or (own != action and (repository() / own).is_file()), action


def test_an_action_has_one_version() -> None:
    """No two steps use different commits of one action."""
    actions = {step["uses"] for step in STEPS if "uses" in step}
    assert len({action.split("@")[0] for action in actions}) == len(actions)


@pytest.mark.parametrize("name", JOBS)
def test_jobs_end_and_may_little(name: str) -> None:
    """Each has a time limit, and reads the sources; one alone may publish, when it is a release."""
    job: dict[str, Any] = JOBS[name]
    assert job["permissions"] == (PUBLISHES if name == "release/image" else {"contents": "read"})
    called = job.get("uses", "").startswith("$/")  # its own jobs have limits
    assert called or 0 < job["timeout-minutes"] <= 120
    for step in job.get("steps", []):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@pytest.mark.parametrize("name", FLOWS)
def test_workflows_grant_nothing_by_themselves(name: str) -> None:
    """Permissions are those of jobs, and one run a branch or tag is enough."""
    assert FLOWS[name]["permissions"] == {}
    assert "github.ref" in FLOWS[name]["concurrency"]["group"]
    groups = {flow["concurrency"]["group"] for flow in FLOWS.values()}
    assert len(groups) == len(FLOWS), "a workflow that calls another would wait for itself"


def test_the_checks_are_those_of_any_machine() -> None:
    """.ci/run is the checks; what else is run is a target of the Makefile that is there."""
    lines = [line for step in JOBS["ci/checks"]["steps"] if (line := step.get("run"))]
    assert lines == ['.ci/run "$STEP"']
    assert os.access(repository() / ".ci" / "run", os.X_OK)
    script = (repository() / ".ci" / "run").read_text()
    targets = set(re.findall(r"^\.PHONY: (\S+)$", MAKEFILE, re.MULTILINE))
    for text in (script, *(step.get("run", "") for step in STEPS)):
        assert set(re.findall(r"\bmake (?:--silent )?([\w-]+)", text)) <= targets
    called = set(re.findall(r"\bmake ([\w-]+)", script))
    assert {"check", "test-gateway", "test-vllm", "test-clients", "soak", "test-all"} <= called
    steps = " ".join(JOBS["ci/checks"]["strategy"]["matrix"]["step"])
    assert f"${{@:-{steps}}}" in script, "the jobs of the workflow are all steps, in any order"


def test_the_wheel_that_is_kept_is_tested() -> None:
    """One job builds it; those that test Python code get that one, and name it to the tests."""
    uploads = [name for name, job in JOBS.items() if _uses(job, "actions/upload-artifact")]
    assert uploads == ["ci/build"]
    tests = [
        name for name, job in JOBS.items() if re.search(r"\.ci/run|make test(?!-images)", str(job))
    ]
    assert sorted(tests) == ["ci/checks", "ci/pythons"]
    for name in tests:
        job = JOBS[name]
        assert job["needs"] == "build"
        assert _uses(job, "actions/download-artifact")
        variables = [part.get("env", {}).get("WHEEL") for part in (job, *job["steps"])]
        assert "${{ needs.build.outputs.wheel }}" in variables
    assert '--no-skips \\\n\t\t\t\t"--wheel=$WHEEL"' in (repository() / ".ci" / "run").read_text()
    suites = re.findall(r"-m pytest (.*)", MAKEFILE)
    assert suites
    for command in suites:
        assert "$(TESTED)" in command or "tests/deploy" in command


def test_coverage_has_a_floor() -> None:
    """One job measures it, and pyproject.toml says what is too little."""
    assert [step for step in STEPS if step.get("run") == "make coverage"]
    project = tomllib.loads((repository() / "pyproject.toml").read_text())
    assert 50 < project["tool"]["coverage"]["report"]["fail_under"] < 100
    assert project["tool"]["coverage"]["run"]["branch"] is True


def _uses(job: dict[str, Any], action: str) -> bool:
    return any(step.get("uses", "").startswith(f"{action}@") for step in job.get("steps", []))


def test_every_image_is_built_listed_and_published() -> None:
    """All targets of `make images`: built, with a list of contents, and pushed by a release."""
    targets = set(re.findall(r"^IMAGES \?= (.*)$", MAKEFILE, re.MULTILINE)[0].split())
    runs = " ".join(step.get("run", "") for step in STEPS)
    built = re.findall(r'make images IMAGES=(?:"([^"]+)"|(\w+))', runs)
    assert set(" ".join(a or b for a, b in built).split()) == targets
    listed = [step["with"]["image"] for step in STEPS if "sbom-action" in step.get("uses", "")]
    assert set(listed) == {f"taskvec:{target}" for target in targets}
    assert set(JOBS["release/image"]["strategy"]["matrix"]["target"]) == targets


def test_caches_depend_on_locks() -> None:
    """What is kept between runs is renewed when a lock changes; a release keeps nothing."""
    caching = [step for step in STEPS if "cache" in step.get("with", {})]
    assert len(caching) == 3
    for step in caching:
        for pattern in step["with"]["cache-dependency-path"].split():
            assert list(repository().glob(pattern)), pattern
    kept = [step for step in JOBS["release/image"]["steps"] if "cache" in step.get("with", {})]
    assert not kept


def test_dependabot_looks_where_versions_are() -> None:
    """Each folder that it is told of has something of that kind."""
    signs = {
        "github-actions": {".github"},
        "pip": {"pyproject.toml", "dev.txt", "checkov.txt"},
        "npm": {"package-lock.json"},
        "docker": {"Dockerfile"},
        "docker-compose": {"docker-compose.yml"},
    }
    updates = yaml.safe_load((FOLDER / "dependabot.yml").read_text())["updates"]
    assert {update["package-ecosystem"] for update in updates} == set(signs)
    for update in updates:
        for folder in update.get("directories", [update.get("directory")]):
            names = {path.name for path in (repository() / folder.strip("/")).iterdir()}
            assert names & signs[update["package-ecosystem"]], folder
