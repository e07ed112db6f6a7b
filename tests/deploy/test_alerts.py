"""The alert rules parse, read what is there, fire when they should, and say what to do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from conftest import repository
from promql import Scrape, promtool
from taskvec.settings import Settings, environment_variable

FOLDER = repository() / "deploy" / "alerts"
GROUPS = yaml.safe_load((FOLDER / "taskvec.yaml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
NAMES = sorted({alert["alert"] for alert in ALERTS})
RECORDED = frozenset(rule["record"] for rule in RULES if "record" in rule) | {"up"}
RUNBOOKS = sorted((repository() / "docs" / "runbooks").iterdir())
SECTIONS = ["## Meaning", "## Impact", "## Diagnosis", "## Mitigation"]


@pytest.mark.full("the files of Prometheus, checked by promtool")
@pytest.mark.parametrize("command", ["check rules taskvec.yaml", "test rules tests.yaml"])
def test_promtool_is_content(command: str) -> None:
    """Prometheus reads the rules, and each alert fires and stays quiet as tests.yaml says."""
    done = subprocess.run(
        [promtool(), *command.split()], cwd=FOLDER, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", NAMES)
def test_every_alert_is_seen_firing_and_quiet(alert: str) -> None:
    """tests.yaml has for each severity of each alert a case that fires, and a case with less."""
    cases = yaml.safe_load((FOLDER / "tests.yaml").read_text())["tests"]
    checks = [check for case in cases for check in case["alert_rule_test"]]
    fired = [check["exp_alerts"] for check in checks if check["alertname"] == alert]
    wanted = {rule["labels"]["severity"] for rule in ALERTS if rule["alert"] == alert}
    assert {one["exp_labels"]["severity"] for alerts in fired for one in alerts} == wanted
    assert [] in fired


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_read_series_that_exist(rule: dict[str, str]) -> None:
    """Each series, label and label value of an expression is in a scrape, or is recorded."""
    assert Scrape().faults(rule["expr"], RECORDED) == []


@pytest.mark.parametrize(
    ("expression", "fault"),
    [
        ("rate(taskvec_request_total[5m])", "no series taskvec_request_total"),
        ('taskvec_engine_state{state="ded"}', "no taskvec_engine_state with state like ded"),
        ('taskvec_queue_tokens{task=~".+"}', "no taskvec_queue_tokens with task like .+"),
    ],
)
def test_what_does_not_exist_is_found(expression: str, fault: str) -> None:
    """A misspelt series, a value that no label has, and a label that is not there are faults."""
    assert Scrape().faults(expression) == [fault]


@pytest.mark.parametrize("alert", NAMES)
def test_every_alert_links_its_runbook(alert: str) -> None:
    """Its annotation names a page of its own, with meaning, impact, diagnosis and mitigation."""
    links = {rule["annotations"]["runbook_url"] for rule in ALERTS if rule["alert"] == alert}
    assert links == {f"docs/runbooks/{alert}.md"}
    page = (repository() / links.pop()).read_text()
    assert page.startswith(f"# {alert}\n")
    assert re.findall(r"^## .*$", page, re.MULTILINE) == SECTIONS


@pytest.mark.parametrize("file", RUNBOOKS, ids=lambda file: file.stem)
def test_every_runbook_has_its_alert(file: Path) -> None:
    """No page is left of an alert that is gone."""
    assert file.stem in NAMES


@pytest.mark.parametrize("file", RUNBOOKS, ids=lambda file: file.stem)
def test_runbooks_name_what_there_is(file: Path) -> None:
    """Queries can show something, settings are settings."""
    page = file.read_text()
    queries = re.findall(r"^```promql\n(.*?)```", page, re.MULTILINE | re.DOTALL)
    assert queries
    for expression in "".join(queries).splitlines():
        assert Scrape().faults(expression, RECORDED) == [], expression
    settings = {environment_variable(field) for field in Settings.model_fields}
    assert set(re.findall(r"TASKVEC_\w+", page)) <= settings
