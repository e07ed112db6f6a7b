"""Prometheus' own checker, and what a PromQL expression reads."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import promql_parser
from prometheus_client.parser import text_string_to_metric_families
from promql_parser import MatchOp, VectorSelector

from taskvec.metrics.registry import Metrics

TARGET_LABELS = {"namespace", "job", "instance", "pod"}
"""Labels that Prometheus adds to whatever it scrapes."""


def promtool() -> str:
    """Path of promtool; where it is not installed, it is fetched once into ``.cache``.

    Raises:
        RuntimeError: it is not there and cannot be fetched; the message says what to do.
    """
    found = shutil.which("promtool")
    if found:
        return found
    kept = Path(__file__).parents[1] / ".cache" / "promtool"
    if not kept.is_file():
        kept.parent.mkdir(exist_ok=True)
        # Beside its place, since a file can be moved at one stroke only within a file system.
        with tempfile.TemporaryDirectory(dir=kept.parent) as room:
            _fetched(Path(room)).replace(kept)
    return str(kept)


def _fetched(room: Path) -> Path:
    script = "apt-get download --quiet prometheus && dpkg-deb --extract prometheus_*.deb ."
    done = subprocess.run(
        ["/bin/sh", "-c", script], cwd=room, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            "These tests need promtool: put Prometheus' promtool on the path, or let apt-get find "
            f"the package prometheus (apt-get update). {done.stderr.strip()[-500:]}"
        )
    return room / "usr" / "bin" / "promtool"


def selectors(expression: str) -> list[VectorSelector]:
    """Every selector of an expression.

    Raises:
        ValueError: it is not PromQL.
    """
    found: list[VectorSelector] = []

    def note(node: promql_parser.Expr) -> None:
        if isinstance(node, VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(expression), pre_visit=note)
    return found


class Scrape:
    """A page of /metrics of a service with an engine server behind it, as Prometheus reads it."""

    def __init__(self) -> None:
        metrics = Metrics(["retrieval.query", "clustering"])
        metrics.server_changed("http://engine", serving=True)
        metrics.describe(version="1", model="m", engine="packed")
        self.page = metrics.render("ready").decode()
        self._labels: dict[str, dict[str, set[str]]] = {}
        for family in text_string_to_metric_families(self.page):
            for sample in family.samples:
                values = self._labels.setdefault(sample.name, {})
                for label, value in sample.labels.items():
                    values.setdefault(label, set()).add(value)

    def faults(self, expression: str, recorded: frozenset[str] = frozenset()) -> list[str]:
        """What an expression reads that is in no scrape: series, labels, values.

        Args:
            expression: PromQL.
            recorded: series of recording rules, and of Prometheus itself.
        """
        faults = []
        for selector in selectors(expression):
            if selector.name in recorded:
                continue
            labels = self._labels.get(selector.name)
            if labels is None:
                faults.append(f"no series {selector.name}")
                continue
            for matcher in selector.matchers.matchers:
                if matcher.name in TARGET_LABELS:
                    continue
                values = labels.get(matcher.name, set())
                plain = matcher.op in (MatchOp.Equal, MatchOp.NotEqual)
                pattern = re.escape(matcher.value) if plain else matcher.value
                if not any(re.fullmatch(pattern, value) for value in values):
                    faults.append(f"no {selector.name} with {matcher.name} like {matcher.value}")
        return faults
