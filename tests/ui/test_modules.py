"""The arithmetic of the page, run by node and compared with numpy and with the service's own."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import numpy as np
import pytest

from programs import node
from taskvec.api.ui import FOLDER
from taskvec.core.output_format import OutputType, quantise

TYPES = [kind for kind in OutputType if kind is not OutputType.FLOAT16]


def run(module: str, expression: str, *values: Any) -> Any:
    """Evaluate a JavaScript expression in which ``m`` is a module of the page, and ``v`` values."""
    code = (
        f"const m = await import({json.dumps((FOLDER / module).as_uri())});"
        "const v = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        f"console.log(JSON.stringify({expression}));"
    )
    script = (
        "import { createRequire } from 'node:module';"
        f"const require = createRequire({json.dumps((FOLDER / module).as_uri())});{code}"
    )
    done = subprocess.run(
        [node(), "--no-warnings", "--input-type=module", "-e", script],
        input=json.dumps(values),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def vectors() -> np.ndarray:
    made = np.random.default_rng(5).normal(size=(12, 64)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def test_the_output_types_are_the_services() -> None:
    """The page offers each type that is not for raw bytes only, at the size that it has."""
    assert run("vectors.js", "m.OUTPUT_TYPES") == [kind.value for kind in TYPES]
    sizes = run("vectors.js", "m.OUTPUT_TYPES.map((type) => m.bytesPerVector(type, 64))")
    assert sizes == [kind.bytes_for(64) for kind in TYPES]


@pytest.mark.parametrize("kind", TYPES)
def test_rankings_are_those_of_the_vectors(kind: OutputType, vectors: np.ndarray) -> None:
    """Each type is ranked by the cosine of its values, or by its unequal bits."""
    rows = quantise(vectors, kind)
    ranked = run(
        "vectors.js",
        "m.rank(v[0], v[1], v[2])",
        kind.value,
        *map(list, [rows[0].tolist(), rows[1:].tolist()]),
    )
    if kind.packed:
        bits = np.unpackbits(
            (rows.astype(np.int16) + 128 * (kind is OutputType.BINARY)).astype(np.uint8), axis=1
        )
        scores = 1 - 2 * (bits[1:] != bits[0]).mean(axis=1)
    else:
        values = rows.astype(np.float64) - 128 * (kind is OutputType.UINT8)
        values /= np.linalg.norm(values, axis=1, keepdims=True)
        scores = values[1:] @ values[0]
    order = np.argsort(-np.round(scores, 9), kind="stable")
    assert [each["index"] for each in ranked] == order.tolist()
    np.testing.assert_allclose([each["score"] for each in ranked], scores[order], atol=1e-6)


def test_principal_components_are_those_of_numpy(vectors: np.ndarray) -> None:
    """The map and its share of the variance are those of a singular value decomposition."""
    stretched = vectors * np.r_[4.0, 2.0, np.ones(62)].astype(np.float32)
    found = run("vectors.js", "m.principalComponents(v[0])", stretched.tolist())
    centred = stretched.astype(np.float64) - stretched.mean(axis=0)
    left, values, _ = np.linalg.svd(centred)
    expected = left[:, :2] * values[:2]
    points = np.array(found["points"])
    signs = np.sign((points * expected).sum(axis=0))
    np.testing.assert_allclose(points * signs, expected, atol=2e-3)
    assert found["explained"] == pytest.approx(
        (values[:2] ** 2).sum() / (values**2).sum(), abs=1e-4
    )


def test_equal_vectors_have_a_map() -> None:
    """Texts with one and the same vector are all in the middle: nothing is divided by zero."""
    found = run("vectors.js", "m.principalComponents(v[0])", [[1.0, 2.0]] * 4)
    assert found == {"points": [[0, 0]] * 4, "explained": 0}


def test_texts_that_cover_each_other_are_listed() -> None:
    """Places nearer to each other than a dot's radius are a group, whose numbers are shown."""
    places = [[50, 50], [50, 50], [90, 90], [54, 50], [10, 10]]
    assert run("charts.js", "m.covered(v[0], 8)", places) == [[0, 1, 3]]
    assert run("charts.js", "m.covered(v[0], 8)", [[0, 0], [8, 0]]) == []
    assert run("charts.js", "m.numbersOf([0, 1, 3])") == "1, 2, 4"
    assert run("charts.js", "m.numbersOf([0, 1, 2, 3, 4, 5])") == "1, 2, 3, 4 and 2 more"


@pytest.mark.parametrize("flip", [1, -1])
def test_maps_are_turned_towards_each_other(flip: int) -> None:
    """A map that was turned and mirrored is turned and mirrored back."""
    points = np.random.default_rng(2).normal(size=(9, 2))
    turn = np.array([[0.6, -0.8], [0.8, 0.6]]) @ np.diag([1, flip])
    back = run("vectors.js", "m.aligned(v[0], v[1])", (points @ turn.T).tolist(), points.tolist())
    np.testing.assert_allclose(back, points, atol=1e-9)


BEFORE = """# HELP a_total A.
a_total{task="x",status="200"} 3.0
a_total{task="y \\"z\\"",status="200"} 4.0
h_bucket{le="0.1"} 1.0
h_bucket{le="1.0"} 2.0
h_bucket{le="+Inf"} 2.0
h_sum 0.5
h_count 2.0
"""
AFTER = """a_total{task="x",status="200"} 5.0
a_total{task="y \\"z\\"",status="200"} 8.0
h_bucket{le="0.1"} 5.0
h_bucket{le="1.0"} 10.0
h_bucket{le="+Inf"} 10.0
h_sum 4.5
h_count 10.0
"""


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("m.total(b, 'a_total')", 13),
        ("m.total(b, 'other')", None),
        ("m.growth(a, b, 'a_total')", 6),
        ("m.growth(b, a, 'a_total')", None),
        ("m.mean(a, b, 'h')", 0.5),
        ("m.mean(a, a, 'h')", None),
        ("m.quantile(a, b, 'h', 0.5)", 0.1),
        ("m.quantile(a, b, 'h', 0.75)", 0.55),
        ("m.quantile(a, a, 'h', 0.5)", None),
    ],
)
def test_changes_between_two_scrapes(expression: str, expected: float | None) -> None:
    """Counters, means and quantiles are those of the time between two scrapes."""
    found = run(
        "metrics.js", f"((a, b) => {expression})(m.parse(v[0]), m.parse(v[1]))", BEFORE, AFTER
    )
    assert found == (None if expected is None else pytest.approx(expected))
