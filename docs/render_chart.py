"""Write the Helm chart's README.md and values.schema.json from its values.yaml (``make docs``).

In values.yaml a comment ``# -- ...`` above a key describes it; a line ``# @schema {...}`` adds to
the type that follows from the default. A mapping with a description of its own is a Kubernetes
object and accepts any keys; other mappings belong to the chart and refuse unknown keys. ``config``
contains the settings of taskvec.
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
"""Settings that the chart derives from other values."""

SECRETS = {"api_keys", "engine_api_key"}

_KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):")
_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array"}


class Value(NamedTuple):
    """A described value: path, default, description, and the additions of ``@schema``."""

    path: tuple[str, ...]
    default: Any
    description: str
    schema: dict[str, Any]


def described_values(text: str) -> Iterator[Value]:
    """Yield the described values of a values.yaml, in their order."""
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
    """Return the JSON schema of a values.yaml."""
    root: dict[str, Any] = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "additionalProperties": False,
        "properties": {"global": {"type": "object", "description": "Set by parent charts."}},
    }
    for value in described_values(text):
        parent = root
        for key in value.path[:-1]:
            parent = parent["properties"].setdefault(
                key, {"type": "object", "additionalProperties": False, "properties": {}}
            )
        kind = "object" if isinstance(value.default, dict) else _TYPES.get(type(value.default))
        entry = {"description": value.description, "type": kind} | value.schema
        if value.path == ("config",):
            entry |= {"additionalProperties": False, "properties": settings_schema()}
        parent["properties"][value.path[-1]] = entry
    return root


def settings_schema() -> dict[str, Any]:
    """Return the schema of each setting that ``config`` accepts, by environment variable."""
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


INTRODUCTION = """# Helm chart of taskvec

A release has one of three shapes:

| `mode` | workloads | use it for |
|---|---|---|
| `cpu` | taskvec with its own engine | no GPU, small models |
| `gpu` | taskvec with vLLM in the process | one or several GPUs in one machine; each pod is a complete service |
| `split` | a gateway Deployment, and a StatefulSet of vLLM servers that it finds by DNS | many GPUs; when a server fails, its calls are retried on another one |

```sh
helm install embeddings deploy/helm/taskvec
helm install embeddings deploy/helm/taskvec --set mode=gpu,model.name=jinaai/jina-embeddings-v5-text-small
helm install embeddings deploy/helm/taskvec -f deploy/helm/taskvec/ci/split-values.yaml
helm test embeddings
```

**API keys.** `taskvec key web >> keys.toml` prints the secret once and writes its hash to the file; `--set-file auth.keys=keys.toml` creates a Secret with the file, and `auth.existingSecret` uses an existing one.
Changed keys take effect without a restart.

**Start and stop.** A pod is ready when every adapter is verified.
After SIGTERM it reports at once that it is not ready, and accepts requests for `drain.grace` more seconds, so taskvec's pods need no preStop hook; the pods of vLLM servers have one, because vLLM refuses requests at once.

**Air gap.** With `model.offline` no hub is contacted; the network policies then allow pods to reach only DNS in `kube-system`, the engine servers and `networkPolicy.egress`.
The model is in the image, in a folder on a volume, or in a hub's cache on a claim:

```sh
HF_HOME=/mnt/claim/huggingface taskvec check jinaai/jina-embeddings-v5-text-small    # on a machine with a network
helm install embeddings deploy/helm/taskvec -f deploy/helm/taskvec/ci/airgapped-values.yaml
```

**Scaling.** A HorizontalPodAutoscaler or a KEDA ScaledObject uses the number of waiting tokens and the age of the oldest waiting text.
A gateway cannot distinguish texts that wait in its servers from texts that are being embedded, so in mode `split` the servers are scaled by vLLM's `vllm:num_requests_waiting`: configure Prometheus to scrape them (`metrics.monitor`, `networkPolicy.monitoringFrom`).

**Validation.** Contradictory values fail the rendering of the chart with a message that names them; unknown keys fail it as well.
`nameOverride` is part of selectors, which Kubernetes does not allow to change: set it before the first installation.

## Values

`make docs` writes this page and `values.schema.json` from `values.yaml`.

| value | default | meaning |
|---|---|---|
"""


def readme(text: str) -> str:
    """Return the chart's README.md."""
    rows = []
    for value in described_values(text):
        default = json.dumps(value.default)
        cells = [f"`{'.'.join(value.path)}`", f"`{default}`", value.description]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return INTRODUCTION + "".join(rows)


def pages() -> dict[Path, str]:
    """Return the content of each generated file of the chart."""
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
        # Helm cannot read files outside the chart.
        **{copy: file.read_text() for copy, file in copies.items() if file.is_file()},
    }


if __name__ == "__main__":
    for file, content in pages().items():
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
        print(f"wrote {file.relative_to(ROOT)}")
