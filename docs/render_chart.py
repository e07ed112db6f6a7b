"""Writes the Helm chart's README.md and values.schema.json from its values.yaml (``make docs``).

In values.yaml a comment ``# -- ...`` above a key describes it; a line ``# @schema {...}`` adds to
what the default tells of its type. A mapping that is described as a whole is one of Kubernetes'
own, and open; the others are the chart's, and refuse unknown keys. ``config`` has the settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from taskvec.settings import Settings, environment_variable

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "taskvec"

SET_BY_CHART = {
    "host", "port", "model", "revision", "engine", "engine_url", "engine_ca", "cache_dir", "device",
    "drain_grace", "drain_timeout", "keys_file", "tls_cert", "tls_key",
}  # fmt: skip
"""Settings that follow from other values of the chart."""

SECRETS = {"api_keys", "engine_api_key"}

_KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):")
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}


class Value(NamedTuple):
    """A described value: its path, default, description, and what ``@schema`` adds."""

    path: tuple[str, ...]
    default: Any
    description: str
    schema: dict[str, Any]


def described_values(text: str) -> Iterator[Value]:
    """Every described value of a values.yaml, in its order."""
    defaults = yaml.safe_load(text)
    path: list[str] = []
    comments: list[str] = []
    for line in text.splitlines():
        content = line.strip()
        if content.startswith("#"):
            comments.append(content.removeprefix("# "))
            continue
        found = _KEY.match(line)
        if found:
            del path[len(found["indent"]) // 2 :]
            path.append(found["key"])
            words = [comment[3:] for comment in comments if comment.startswith("-- ")]
            schemas = [comment[8:] for comment in comments if comment.startswith("@schema ")]
            if words:
                value: Any = defaults
                for key in path:
                    value = value[key]
                yield Value(tuple(path), value, words[0], json.loads("".join(schemas) or "{}"))
        comments = []


def schema(text: str) -> dict[str, Any]:
    """The JSON schema of a values.yaml."""
    root: dict[str, Any] = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "additionalProperties": False,
        "properties": {"global": {"type": "object", "description": "Given by parent charts."}},
    }
    for value in described_values(text):
        place = root
        for key in value.path[:-1]:
            place = place["properties"].setdefault(
                key, {"type": "object", "additionalProperties": False, "properties": {}}
            )
        kind = "object" if isinstance(value.default, dict) else _TYPES.get(type(value.default))
        entry = {"description": value.description, "type": kind} | value.schema
        if value.path == ("config",):
            entry |= {"additionalProperties": False, "properties": settings_schema()}
        place["properties"][value.path[-1]] = entry
    return root


def settings_schema() -> dict[str, Any]:
    """The settings that ``config`` may have, by their variables."""
    described = Settings.model_json_schema()
    entries = {}
    for name, field in described["properties"].items():
        if name in SET_BY_CHART | SECRETS:
            continue
        kind = next((part for part in field.get("anyOf", []) if part["type"] != "null"), field)
        if "$ref" in kind:
            kind = described["$defs"][kind["$ref"].rpartition("/")[2]]
        if kind["type"] == "array":
            kind = {"type": "string"}  # names, separated by commas
        keep = ("type", "enum", "pattern", "minimum", "maximum", "exclusiveMinimum")
        entries[environment_variable(name)] = {"description": field["description"]} | {
            key: kind[key] for key in keep if key in kind
        }
    return entries


INTRODUCTION = """# taskvec's Helm chart

One release is one of three shapes:

| `mode` | what runs | take it for |
|---|---|---|
| `cpu` | taskvec with its own engine | no GPU, small models |
| `gpu` | taskvec with vLLM in the process | a GPU or a few in one machine, each pod a whole service |
| `split` | a gateway Deployment, and a StatefulSet of vLLM servers that it finds by DNS | many GPUs; a server that dies costs no request |

```sh
helm install embeddings deploy/helm/taskvec
helm install embeddings deploy/helm/taskvec --set mode=gpu,model.name=jinaai/jina-embeddings-v5-text-small
helm install embeddings deploy/helm/taskvec -f deploy/helm/taskvec/ci/split-values.yaml
helm test embeddings
```

**API keys.** `taskvec key web >> keys.toml` prints the secret once and writes its hash; `--set-file auth.keys=keys.toml` makes a Secret of the file, `auth.existingSecret` names one that is there.
Keys change without a restart.

**Start and stop.** A pod is ready when every adapter is proven.
On SIGTERM it is not ready at once and takes requests for `drain.grace` seconds more, so there is no preStop hook; vLLM's servers have one, since vLLM refuses at once.

**Air gap.** `model.offline` never asks a hub; the policies then let pods reach DNS in `kube-system`, the engine servers and `networkPolicy.egress` alone.
A model comes with the image, from a folder on a volume, or from a hub's cache on a claim:

```sh
HF_HOME=/mnt/claim/huggingface taskvec check jinaai/jina-embeddings-v5-text-small    # where there is a network
helm install embeddings deploy/helm/taskvec -f deploy/helm/taskvec/ci/airgapped-values.yaml
```

**Scaling.** A HorizontalPodAutoscaler or a KEDA ScaledObject follows the tokens that wait and the age of the oldest text.
A gateway cannot tell what waits at its servers from what they embed, so in mode split the servers are scaled by vLLM's `vllm:num_requests_waiting`: let Prometheus scrape them (`metrics.monitor`, `networkPolicy.monitoringFrom`).

**What does not go together** is refused when the chart is rendered, with a sentence that names the values; so are unknown keys.
`nameOverride` is part of selectors, which Kubernetes does not let change: choose it before the first install.

## Values

`make docs` writes this page and `values.schema.json` from `values.yaml`.

| value | default | what it does |
|---|---|---|
"""


def readme(text: str) -> str:
    """The chart's README.md."""
    rows = []
    for value in described_values(text):
        default = json.dumps(value.default)
        cells = [f"`{'.'.join(value.path)}`", f"`{default}`", value.description]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return INTRODUCTION + "".join(rows)


def pages() -> dict[Path, str]:
    """Every generated file of the chart and what it should hold."""
    text = (CHART / "values.yaml").read_text()
    copies = {
        CHART / "files" / "alerts.yaml": ROOT / "deploy" / "alerts" / "taskvec.yaml",
        **{
            CHART / "files" / "dashboards" / file.name: file
            for file in sorted((ROOT / "deploy" / "grafana").rglob("*.json"))
        },
    }
    return {
        CHART / "README.md": readme(text),
        CHART / "values.schema.json": json.dumps(schema(text), indent=2) + "\n",
        # Helm reads no file from outside the chart.
        **{copy: file.read_text() for copy, file in copies.items() if file.is_file()},
    }


if __name__ == "__main__":
    for file, content in pages().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
        print(f"wrote {file.relative_to(ROOT)}")
