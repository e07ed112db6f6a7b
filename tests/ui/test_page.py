"""The page in a real Chromium, against a real ``taskvec serve`` of the built-in model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect, sync_playwright

from conftest import free_port
from keyfiles import entry
from processes import NOT_MEASURED, served
from programs import node, program
from taskvec.core.output_format import OutputType, quantise

pytestmark = pytest.mark.full("the page in a browser")

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
VIEWS = ["try", "search", "compare", "now"]
SECRET = "s3cret-of-the-page"  # noqa: S105 - of a service that the tests start
SHOWN_VALUES = 4
LOW_CONTRASTS = """() => {
  const paper = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
    return getComputedStyle(document.body).backgroundColor;
  };
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((channel) => {
      const share = channel / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !element.checkVisibility() || element.closest(".hidden, .skip, noscript")) continue;
    const [a, b] = [light(getComputedStyle(element).color), light(paper(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) low.push([element.tagName, element.textContent.slice(0, 40), contrast]);
  }
  return low;
}"""
"""Visible texts with a contrast below 4.5, the bound of WCAG 2's level AA."""

WITHOUT_NAME = """() => [...document.querySelectorAll(
  "input, select, textarea, button, canvas, ol, nav, [role=region], a"
)].filter((element) => element.checkVisibility() && !(
  element.labels?.length || element.ariaLabel || element.getAttribute("aria-labelledby")
  || element.textContent.trim()
)).map((element) => element.outerHTML)"""


class Watched:
    """A tab whose requests, messages and errors are watched.

    Attributes:
        page: the tab.
        url: of the service.
        refusals: statuses that the service may answer.
        may_be_down: whether requests may get no answer.
    """

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page: Page = context.new_page()
        self.url = url
        self.refusals: set[int] = set()
        self.may_be_down = False
        self.requests: list[str] = []
        self._messages: list[str] = []
        context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self._messages.append(message.text))
        self.page.on("pageerror", lambda error: self._messages.append(str(error)))

    def open(self, path: str = "/") -> Page:
        self.page.goto(self.url + path)
        return self.page

    def check(self) -> None:
        """Fail if a request went elsewhere, or the console has anything but expected refusals."""
        hosts = {urlsplit(each).netloc for each in self.requests if not each.startswith("data:")}
        assert hosts <= {urlsplit(self.url).netloc}
        allowed = "|".join(map(str, self.refusals)) or "nothing"
        pattern = f"Failed to load resource: the server responded with a status of ({allowed})"
        if self.may_be_down:
            pattern += "|Failed to load resource: net::ERR_"
        assert [text for text in self._messages if not re.match(pattern, text)] == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium; the profile is fresh."""
    path = program("chromium", "google-chrome")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def service() -> Iterator[str]:
    """A service without keys."""
    with served(*NOT_MEASURED, "--log-level", "error") as server:
        yield server.url


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service with a key, also for the metrics."""
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(entry("web", SECRET))
    options = ("--keys-file", str(file), "--no-metrics-without-key")
    with served(*NOT_MEASURED, *options, "--log-level", "error") as server:
        yield server.url


Opened = Callable[..., Watched]


@pytest.fixture
def tab(browser: Browser, service: str) -> Iterator[Opened]:
    """Open tabs, each with a profile of its own; check at the end what they did."""
    opened: list[tuple[BrowserContext, Watched]] = []

    def new(url: str = service, **options: Any) -> Watched:
        context = browser.new_context(**options)
        context.set_default_timeout(20_000)
        opened.append((context, Watched(context, url)))
        return opened[-1][1]

    yield new
    for context, watched in opened:
        context.close()
        watched.check()


def embedded(url: str, **body: Any) -> tuple[np.ndarray, int]:
    """Vectors and tokens of a request."""
    answer = httpx.post(f"{url}/v1/embeddings", json=body, timeout=30).raise_for_status().json()
    return np.array([row["embedding"] for row in answer["data"]]), answer["usage"]["total_tokens"]


def shown(text: str) -> list[float]:
    """The numbers of a line of the page."""
    return [float(each) for each in re.findall(r"-?\d+(?:\.\d+)?", text.replace("\u2212", "-"))]


def test_try_shows_the_vectors_of_the_service(tab: Opened, service: str) -> None:
    """Try shows the service's values, sizes, tokens and stages, and copies a whole vector."""
    watched = tab(permissions=["clipboard-read", "clipboard-write"])
    page = watched.open()
    expect(page.locator("#model")).to_contain_text("taskvec-mini, 256 dimensions")
    page.get_by_label("Texts, one a line", exact=True).fill("one text\n\n  another text  \n")
    page.locator("#try-form").get_by_label("Task").select_option("clustering")
    page.locator("#try-form").get_by_label("Dimensions").select_option("64")
    page.locator("#try-form").get_by_label("Output type").select_option("int8")
    page.get_by_role("button", name="Embed").click()
    expected, tokens = embedded(
        service,
        input=["one text", "another text"],
        task="clustering",
        dimensions=64,
        embedding_type="int8",
    )
    expect(page.locator("#try-status")).to_have_text(
        f"2 vectors for clustering, of 64 int8 dimensions, 64 bytes each. {tokens} tokens."
    )
    rows = page.locator("#try-vectors .values").all_text_contents()
    assert [shown(row)[:6] for row in rows] == expected[:, :6].tolist()
    stages = page.locator("#try-stages dt").all_text_contents()
    assert stages == ["tokenize", "queue", "engine", "encode", "round trip"]
    page.get_by_role("button", name="Copy vector 2").click()
    expect(page.locator("#announcement")).to_have_text("Copied")
    copied = json.loads(page.evaluate("navigator.clipboard.readText()"))
    assert copied == expected[1].tolist()


@pytest.mark.parametrize("language", ["curl", "Python", "JavaScript"])
@pytest.mark.parametrize("kind", ["float", "ubinary"])
def test_the_code_gives_what_is_shown(
    tab: Opened, tmp_path: Path, language: str, kind: str
) -> None:
    """The request in each language, run as it is shown, gives the vectors that are shown."""
    page = tab().open()
    page.get_by_label("Texts, one a line", exact=True).fill('it\'s "quoted" $HOME \\n é\nb')
    page.locator("#try-form").get_by_label("Dimensions").select_option("32")
    page.locator("#try-form").get_by_label("Output type").select_option(kind)
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Embed").click()
    expect(page.locator("#try-status")).to_contain_text("of 32")
    rows = [
        shown(row)[:SHOWN_VALUES]
        for row in page.locator("#try-vectors .values").all_text_contents()
    ]
    page.get_by_text(language, exact=True).click()
    code = page.locator("#try-code").text_content() or ""
    if language == "curl":
        program("curl")
        command = ["sh", "-c", code]
    elif language == "Python":
        (tmp_path / "code.py").write_text(code)
        command = [sys.executable, str(tmp_path / "code.py")]
    else:
        (tmp_path / "code.mjs").write_text(code)
        command = [node(), str(tmp_path / "code.mjs")]
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stderr
    if language == "curl":
        found = [row["embedding"][:SHOWN_VALUES] for row in json.loads(done.stdout)["data"]]
    else:
        numbers = shown(re.sub(r"(?m)^\d+ |Float32Array\(\d+\)|\(\d+\)", "", done.stdout))
        found = np.array(numbers).reshape(2, -1).tolist()
    np.testing.assert_allclose(found, rows, atol=1e-4)


def test_an_earlier_result_is_marked(tab: Opened) -> None:
    """Vectors of another task, type or text than the form's are marked until they are its own."""
    page = tab().open()
    status, note = page.locator("#try-status"), page.locator("#try-earlier")
    first = page.locator("#try-task").input_value()
    expect(status).to_contain_text(f"2 vectors for {first}, of 256 dimensions")
    expect(note).to_be_hidden()
    page.locator("#try-task").select_option("clustering")
    expect(note).to_contain_text("of an earlier request")
    expect(status).to_contain_text(f"for {first}")
    page.locator("#try-task").select_option(first)
    expect(note).to_be_hidden()
    page.locator("#try-type").select_option("binary")
    expect(note).to_contain_text("of an earlier request")
    page.get_by_role("button", name="Embed").click()
    expect(status).to_contain_text("of 256 binary dimensions")
    expect(note).to_be_hidden()
    page.get_by_label("Texts, one a line", exact=True).fill("another")
    expect(note).to_contain_text("of an earlier request")


def test_search_ranks_as_one_types(tab: Opened, service: str) -> None:
    """Both rankings, their movements and sizes are those of the vectors of each setting."""
    page = tab().open("/#search")
    query = "How do I make bread?"
    expect(page.locator("#search-right li")).to_have_count(10)
    page.get_by_label("Query").fill("")
    page.get_by_label("Query").press_sequentially(query, delay=15)
    passages = (page.get_by_label(re.compile("^Passages, one a line")).input_value()).split("\n")
    float_rows, _ = embedded(service, input=passages, task="retrieval.passage")
    asked, _ = embedded(service, input=[query], task="retrieval.query")
    scores = float_rows @ asked[0]
    left = np.argsort(-scores, kind="stable")
    first = page.locator("#search-left li").first
    expect(first.locator(".score")).to_have_text(f"{scores[left[0]]:.3f}")
    names = page.locator("#search-left .text").all_text_contents()
    assert names == [passages[i] for i in left[:10]]

    cut = [quantise(normalised(rows[:, :64]), OutputType.UBINARY) for rows in (float_rows, asked)]
    unequal = (np.unpackbits(cut[0], axis=1) != np.unpackbits(cut[1], axis=1)).sum(axis=1)
    right = np.argsort(unequal, kind="stable")
    assert page.locator("#search-right .text").all_text_contents() == [
        passages[i] for i in right[:10]
    ]
    place = {index: number for number, index in enumerate(left)}
    moved = [place[index] - number for number, index in enumerate(right[:10])]
    words = ["same place" if not m else f"up {m}" if m > 0 else f"down {-m}" for m in moved]
    assert page.locator("#search-right .moved .hidden").all_text_contents() == words
    expect(page.locator("#search-left-bytes")).to_have_text(
        "1,024 bytes a vector, 1.0 GB for a million"
    )
    expect(page.locator("#search-right-bytes")).to_have_text("8 bytes a vector, 8 MB for a million")
    same = len(set(left[:10]) & set(right[:10]))
    expect(page.locator("#search-status")).to_contain_text(f"{same} of the first 10 passages")
    expect(page.locator("#search-status")).to_contain_text("128 times less memory")


def normalised(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_ones_own_passages_and_settings(tab: Opened) -> None:
    """Pasted passages of several lines are ranked, and equal settings give equal rankings."""
    page = tab().open("/#search")
    expect(page.locator("#search-left li")).to_have_count(10)
    page.get_by_label(re.compile("^Passages, one a line")).fill(
        "A cat sleeps\non the sofa.\n\nThe stock market fell.\n \nRain is expected."
    )
    expect(page.locator("#search-count")).to_have_text("3 passages")
    expect(page.locator("#search-left li")).to_have_count(3)
    for side in ("left", "right"):
        page.locator(f"#search-{side}-dimensions").select_option("128")
        page.locator(f"#search-{side}-type").select_option("uint8")
    page.get_by_label("Query").fill("a pet that is tired")
    expect(page.locator("#search-status")).to_have_text("3 of the first 3 passages are the same.")
    expect(page.locator("#search-left .text").first).to_have_text("A cat sleeps\non the sofa.")
    expect(page.locator("#search-right .moved")).to_have_text(["same place"] * 3)
    page.get_by_role("button", name="Use the sample").click()
    expect(page.locator("#search-count")).to_have_text("40 passages")


def test_late_answers_are_dropped(tab: Opened) -> None:
    """An answer that comes after that of a later query does not replace it."""
    page = tab().open("/#search")
    expect(page.locator("#search-left li")).to_have_count(10)
    held: list[Route] = []

    def hold(route: Route) -> None:
        if "sourdough" in (route.request.post_data or ""):
            held.append(route)
        else:
            route.continue_()

    # In the page the requests cannot be taken back: only that their answers are dropped counts.
    page.evaluate("AbortController.prototype.abort = () => {}")
    page.route("**/v1/embeddings", hold)
    page.get_by_label("Query").fill("sourdough yeast")
    page.wait_for_timeout(400)
    assert len(held) == 2
    page.get_by_label("Query").fill("the moon and the sea")
    tides = page.locator("#search-left .text", has_text="Tides follow the moon")
    expect(tides).to_be_visible()
    names = page.locator("#search-left .text").all_text_contents()
    for route in held:
        route.continue_()
    page.wait_for_timeout(500)
    assert page.locator("#search-left .text").all_text_contents() == names


def test_typing_does_not_embed_the_passages_again(tab: Opened) -> None:
    """The passages are sent once for each setting, however slowly they are embedded."""
    watched = tab()
    sent: list[Route] = []

    def hold(route: Route) -> None:
        if "retrieval.passage" in (route.request.post_data or ""):
            sent.append(route)
        else:
            route.continue_()

    watched.page.route("**/v1/embeddings", hold)
    page = watched.open("/#search")
    for query in ("bread", "bread dough"):
        page.get_by_label("Query").fill(query)
        page.wait_for_timeout(300)
    assert len(sent) == 2
    for route in sent:
        route.continue_()
    expect(page.locator("#search-left .text").first).to_contain_text("bread dough rise")
    assert len(sent) == 2


def test_compare_shows_four_tasks_of_one_request(tab: Opened, service: str) -> None:
    """Heat maps, table and maps are those of the vectors of each task, from a single request."""
    watched = tab()
    page = watched.open("/#compare")
    expect(page.locator("#compare-status")).to_contain_text("24 texts, 4 tasks, one request")
    assert len([url for url in watched.requests if url.endswith("/v1/embeddings")]) == 1
    texts = page.get_by_label("Texts, one a line, 2 to 200").input_value().split("\n")
    tasks = page.locator("#compare-panels h2").all_text_contents()
    assert tasks == ["retrieval.passage", "text-matching", "clustering", "classification"]
    page.get_by_text("As a table").click()
    cells = page.locator("#compare-table td").all_text_contents()
    for column, task in enumerate(tasks):
        rows, _ = embedded(service, input=texts, task=task)
        cosines = rows @ rows.T
        pairs = cosines[~np.eye(len(texts), dtype=bool)]
        text = page.locator("#compare-panels .range").nth(2 * column).text_content() or ""
        np.testing.assert_allclose(shown(text), [pairs.min(), pairs.max()], atol=0.006)
        np.fill_diagonal(cosines, -1)
        for row, cell in enumerate(cells[column :: len(tasks)]):
            index, nearest = int(cell.partition(":")[0]) - 1, int(cosines[row].argmax())
            assert cosines[row, index] == pytest.approx(cosines[row, nearest], abs=1e-4)
            assert cell.startswith(f"{index + 1}: {texts[index]}")
    colours = page.evaluate(
        """() => [...document.querySelectorAll(".heat")].map((canvas) => {
          const { width, height } = canvas, cell = width / 24;
          const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
          const at = (i, j) => {
            const start = 4 * (Math.floor((i + .5) * cell) * width + Math.floor((j + .5) * cell));
            return [...data.slice(start, start + 4)];
          };
          return [at(0, 0), at(5, 5), at(0, 9)];
        })"""
    )
    assert all(first == second != other for first, second, other in colours)
    assert len({tuple(first) for first, _, _ in colours}) == 4, "each task has its colour"
    drawn = page.evaluate(
        """() => [...document.querySelectorAll(".map")].map((canvas) =>
          canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
            .data.filter((value, i) => i % 4 === 3 && value > 0).length)"""
    )
    assert all(pixels > 24 * 30 for pixels in drawn)


def test_compare_follows_pointer_and_tasks(tab: Opened) -> None:
    """A dot and a square name their texts; the tasks can be chosen; bounds are stated."""
    page = tab().open("/#compare")
    expect(page.locator("#compare-status")).to_contain_text("24 texts")
    page.locator(".heat").first.hover(position={"x": 30, "y": 3})
    expect(page.locator("#compare-readout")).to_contain_text("1: The train was two hours late")
    page.locator(".map").nth(2).hover()
    expect(page.locator("#compare-readout")).to_contain_text("clustering 0.")
    page.get_by_role("checkbox", name="retrieval.query").check()
    page.get_by_role("checkbox", name="classification").uncheck()
    page.get_by_label("Texts, one a line, 2 to 200").fill("a\nb\nc")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#compare-status")).to_contain_text("3 texts, 4 tasks")
    assert "retrieval.query" in page.locator("#compare-panels h2").all_text_contents()
    page.get_by_label("Texts, one a line, 2 to 200").fill("\n".join(map(str, range(201))))
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("alert")).to_have_text(
        "There are 201 texts, but this page compares 200 at most."
    )


def heat_map_colours(page: Page, n: int) -> list[list[int]]:
    """The colours of the first heat map's squares, row by row."""
    found: list[list[int]] = page.evaluate(
        """(n) => {
          const canvas = document.querySelector(".heat");
          const { width, height } = canvas, cell = width / n;
          const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
          return Array.from({ length: n * n }, (_, at) => {
            const [i, j] = [Math.floor(at / n), at % n];
            const start = 4 * (Math.floor((i + .5) * cell) * width + Math.floor((j + .5) * cell));
            return [...data.slice(start, start + 4)];
          });
        }""",
        n,
    )
    return found


@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_compare_goes_to_its_result(tab: Opened, motion: str) -> None:
    """After the button, the result's heading has the focus and is in sight."""
    page = tab(viewport={"width": 1000, "height": 500}, reduced_motion=motion).open("/#compare")
    expect(page.locator("#compare-status")).to_contain_text("24 texts")
    assert page.evaluate("scrollY") == 0, "no jump without a press"
    page.get_by_role("button", name="Compare").click()
    heading = page.get_by_role("heading", name="Similarities")
    expect(heading).to_be_focused()
    expect(heading).to_be_in_viewport()
    expect(page.locator("#compare-status")).to_be_in_viewport()


def test_compare_leaves_no_old_result_beside_an_error(tab: Opened) -> None:
    """An error is beside the button, and the result of earlier texts goes."""
    watched = tab(viewport={"width": 1000, "height": 500})
    watched.refusals.add(400)
    page = watched.open("/#compare")
    texts = page.get_by_label("Texts, one a line, 2 to 200")
    for wrong, message in (
        ("one", "Write at least two texts"),
        ("a\nb " + "word " * 3000, "tokens"),
    ):
        page.get_by_role("button", name="Use the sample").click()
        expect(page.locator(".heat")).to_have_count(4)
        texts.fill(wrong)
        page.get_by_role("button", name="Compare").click()
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text(message)
        expect(alert).to_be_in_viewport()
        expect(page.locator(".heat, .map")).to_have_count(0)
        expect(page.locator("#compare-status, #compare-readout")).to_have_text(["", ""])
        expect(page.locator("#compare-table")).to_be_hidden()


def test_equal_texts_are_as_dark_as_can_be(tab: Opened) -> None:
    """Squares of a similarity of 1 have the full colour, also where all of them have it."""
    page = tab().open("/#compare")
    expect(page.locator("#compare-status")).to_contain_text("24 texts")
    diagonal = heat_map_colours(page, 24)[0]
    page.get_by_label("Texts, one a line, 2 to 200").fill("same\nsame\nsame")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#compare-status")).to_contain_text("3 texts")
    assert heat_map_colours(page, 3) == [diagonal] * 9


def test_two_texts_have_no_map(tab: Opened) -> None:
    """Two texts are compared by a heat map alone."""
    page = tab().open("/#compare")
    expect(page.locator("#compare-status")).to_contain_text("24 texts")
    page.get_by_label("Texts, one a line, 2 to 200").fill("rain\nA kettle boils water.")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#compare-status")).to_contain_text("2 texts, 4 tasks")
    expect(page.locator(".heat")).to_have_count(4)
    expect(page.locator(".map")).to_have_count(0)
    expect(page.locator("#compare-panels .range").first).to_have_text(
        re.compile(r"^Similarity [\d.\u2212]+$")
    )
    first, other, *rest = heat_map_colours(page, 2)
    assert rest == [other, first]
    assert first != other


def test_now_shows_the_load_while_it_is_in_sight(tab: Opened, service: str) -> None:
    """Requests and tokens a second follow the load; nothing is read behind another view."""
    watched = tab()
    page = watched.open("/#now")
    requests = page.locator("#now-figures .value").first
    expect(requests).to_contain_text("0.0")
    for number in range(40):
        embedded(service, input=[f"text {number}"] * 4)
    figures = dict(
        zip(
            page.locator("#now-figures dt").all_text_contents(),
            page.locator("#now-figures .value").all(),
            strict=True,
        )
    )
    expect(requests).not_to_contain_text("0.0")
    for name in ("Tokens", "Median latency", "Batch fill"):
        expect(figures[name]).to_have_text(re.compile(r"^[\d,.]*[1-9]"))
    expect(page.locator("#now-figures canvas").first).to_have_attribute(
        "aria-label", re.compile(r"^Requests in the last \d+ seconds: ")
    )
    page.get_by_role("link", name="Try").click()
    page.wait_for_timeout(500)
    scrapes = [url for url in watched.requests if url.endswith("/metrics")]
    page.wait_for_timeout(2600)
    assert [url for url in watched.requests if url.endswith("/metrics")] == scrapes
    assert len(scrapes) >= 2


def test_metrics_elsewhere(tab: Opened) -> None:
    """Where the address has no metrics, as behind a proxy, one sentence says so."""
    watched = tab()
    watched.refusals.add(404)
    watched.page.route("**/metrics", lambda route: route.fulfill(status=404, body="no such page"))
    page = watched.open("/#now")
    expect(page.get_by_role("alert")).to_contain_text("There is no /metrics at this address")
    expect(page.locator("#now-status")).to_have_text("")


def test_a_key_is_asked_for_and_kept_in_the_tab(tab: Opened, guarded: str) -> None:
    """The page asks for a key in the service's words, keeps it in the tab only, and forgets it."""
    watched = tab(guarded)
    watched.refusals.add(401)
    page = watched.open()
    expect(page.locator("#key-message")).to_contain_text("This server requires an API key")
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.get_by_role("main")).to_be_hidden()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-message")).to_contain_text("Unknown API key")
    page.get_by_label("API key").fill(SECRET)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#try-status")).to_contain_text("2 vectors")
    expect(page.get_by_label("API key")).to_be_hidden()
    for language in ("curl", "Python", "JavaScript"):
        page.get_by_text(language, exact=True).click()
        code = page.locator("#try-code").text_content() or ""
        assert "TASKVEC_KEY" in code
        assert SECRET not in code
    assert not [url for url in watched.requests if SECRET in url]
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.goto(f"{guarded}/#now")
    page.reload()
    expect(page.locator("#now-figures .value").first).to_contain_text("0.0")
    page.get_by_role("link", name="API description").click()
    expect(page.get_by_text("/v1/embeddings", exact=True)).to_be_visible(timeout=20_000)
    page.go_back()
    page.get_by_role("button", name="Forget the API key").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate("sessionStorage.length") == 0


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_key_that_does_not_work_is_not_kept(tab: Opened, guarded: str, path: str) -> None:
    """A wrong key, or one that no header can have, is named as such; the form stays, or is back."""
    watched = tab(guarded)
    watched.refusals.add(401)
    page = watched.open(path)
    message = page.locator("#key-message, #problem")
    forget = page.get_by_role("button", name="Forget the API key")
    stored = "sessionStorage.getItem('taskvec-key')"
    for key, problem in (
        (f"\u201c{SECRET}\u201d", "cannot be an API key"),
        ("no", "Unknown API key"),
    ):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Use this key").click()
        expect(message).to_contain_text(problem)
        assert page.evaluate(stored) is None
    page.evaluate("sessionStorage.setItem('taskvec-key', '\u201ckey\u201d')")
    page.reload()
    expect(message).to_contain_text("cannot be an API key")
    expect(forget).to_be_visible()
    page.get_by_label("API key").fill(SECRET)
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_label("API key")).to_be_hidden()
    assert page.evaluate(stored) == SECRET
    forget.click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert page.evaluate(stored) is None


def test_errors_are_in_the_services_words(tab: Opened, service: str) -> None:
    """A refusal is shown with the message that the service gave, and goes with the next answer."""
    watched = tab()
    watched.refusals.add(400)
    page = watched.open()
    expect(page.locator("#try-status")).to_contain_text("2 vectors")
    page.get_by_label("Texts, one a line", exact=True).fill("word " * 3000)
    page.get_by_role("button", name="Embed").click()
    refusal = httpx.post(f"{service}/v1/embeddings", json={"input": ["word " * 3000]}).json()
    message = refusal["error"]["message"].replace("input[0]", "Line 1")
    expect(page.get_by_role("alert")).to_have_text(message)
    expect(page.locator("#try-result")).to_be_hidden()
    page.get_by_label("Texts, one a line", exact=True).fill("word")
    page.get_by_role("button", name="Embed").click()
    expect(page.locator("#try-status")).to_contain_text("1 vector for")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_errors_name_the_field_and_its_line(tab: Opened) -> None:
    """An error names the line of the text, or the query; an empty field is not sent."""
    watched = tab()
    watched.refusals.add(400)
    page = watched.open()
    expect(page.locator("#try-status")).to_contain_text("2 vectors")
    texts, alert = page.get_by_label("Texts, one a line", exact=True), page.get_by_role("alert")
    texts.fill("\n fine\n\n" + "word " * 3000)
    page.get_by_role("button", name="Embed").click()
    expect(alert).to_contain_text("Line 4 has more than the 2048 tokens")
    sent = len(watched.requests)
    texts.fill(" \n")
    page.get_by_role("button", name="Embed").click()
    expect(alert).to_have_text("Write at least one text.")
    assert len(watched.requests) == sent
    page.get_by_role("link", name="Search").click()
    expect(page.locator("#search-left li")).to_have_count(10)
    page.get_by_label("Query").fill("word " * 3000)
    expect(alert).to_contain_text("The query has more than the 2048 tokens")
    page.get_by_label("Query").fill("a word")
    expect(page.locator("#search-left li")).to_have_count(10)
    passages = page.get_by_label(re.compile("^Passages, one a line"))
    passages.fill("\nfirst\nof two lines\n\n\n" + "word " * 3000 + "\nand more\n")
    expect(alert).to_contain_text("The passage of line 6 has more than the 2048 tokens")
    passages.evaluate(  # the browser needs long to type so many lines
        "(field) => { field.value = 'x\\n'.repeat(3000); field.dispatchEvent(new Event('input')); }"
    )
    expect(alert).to_contain_text("Passages: ")
    page.get_by_role("link", name="Compare").click()
    expect(page.locator(".heat")).to_have_count(4)
    page.get_by_label("Texts, one a line, 2 to 200").fill("a\n\n" + "word " * 3000)
    page.get_by_role("button", name="Compare").click()
    expect(alert).to_contain_text("Line 3 has more than the 2048 tokens")


def test_a_model_that_is_not_listed(tab: Opened) -> None:
    """Where the models cannot be read, the page has the reason, and no forms without effect."""
    watched = tab()
    watched.refusals.add(503)
    watched.page.route(
        "**/v1/models", lambda route: route.fulfill(status=503, json={"error": "not now"})
    )
    page = watched.open()
    expect(page.get_by_role("alert")).to_have_text("not now")
    expect(page.get_by_role("button", name="Embed")).to_be_hidden()


def test_the_service_is_gone(tab: Opened) -> None:
    """Without an answer the page says so."""
    watched = tab()
    page = watched.open()
    expect(page.locator("#try-status")).to_contain_text("2 vectors")
    page.route("**/v1/embeddings", lambda route: route.abort())
    page.get_by_role("button", name="Embed").click()
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer.")
    watched._messages.clear()  # the browser's own line about it


def test_views_recover_when_the_service_is_back(tab: Opened) -> None:
    """Without a key press, Search and Try have results soon after the service answers again."""
    port = free_port()
    with served(*NOT_MEASURED, "--log-level", "error", port=port) as server:
        tabs = [tab(server.url), tab(server.url)]
        for watched in tabs:
            watched.may_be_down = True
            watched.refusals.add(503)
        search, trial = tabs[0].open("/#search"), tabs[1].open("/#try")
        expect(search.locator("#search-left li")).to_have_count(10)
        expect(trial.locator("#try-status")).to_contain_text("2 vectors")
    search.get_by_label("Query").fill("bread")
    trial.get_by_role("button", name="Embed").click()
    for page in (search, trial):
        expect(page.get_by_role("alert")).to_contain_text("The service does not answer.")
    expect(search.locator("#search-left li")).to_have_count(0)
    with served(*NOT_MEASURED, "--log-level", "error", port=port):
        expect(search.locator("#search-left li")).to_have_count(10, timeout=15_000)
        expect(trial.locator("#try-status")).to_contain_text("2 vectors", timeout=15_000)
        for page in (search, trial):
            expect(page.get_by_role("alert")).to_be_hidden()


def test_the_page_recovers_when_it_was_opened_early(tab: Opened) -> None:
    """A page opened before the service can embed waits for it."""
    watched = tab()
    watched.refusals.add(503)
    starting = {"error": {"message": "The engine cannot embed now: its process is starting."}}
    for path in ("**/v1/models", "**/v1/embeddings"):
        watched.page.route(path, lambda route: route.fulfill(status=503, json=starting))
    page = watched.open()
    expect(page.get_by_role("alert")).to_contain_text("its process is starting")
    page.unroute("**/v1/models")
    expect(page.get_by_label("Texts, one a line", exact=True)).to_be_visible(timeout=15_000)
    expect(page.locator("#try-problem")).to_contain_text("its process is starting")
    page.unroute("**/v1/embeddings")
    expect(page.locator("#try-status")).to_contain_text("2 vectors", timeout=15_000)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_retries_only_in_sight(tab: Opened) -> None:
    """A view out of sight sends nothing; on return to it, and on Enter, it asks at once."""
    watched = tab()
    watched.may_be_down = True
    page = watched.open("/#search")
    expect(page.locator("#search-left li")).to_have_count(10)
    page.route("**/v1/embeddings", lambda route: route.abort())
    page.get_by_label("Query").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer.")
    page.get_by_role("link", name="Now").click()
    page.wait_for_timeout(200)
    sent = sum(url.endswith("/v1/embeddings") for url in watched.requests)
    page.wait_for_timeout(3500)
    assert sum(url.endswith("/v1/embeddings") for url in watched.requests) == sent
    page.get_by_role("link", name="Search").click()
    expect(page.get_by_role("alert")).to_contain_text("The service does not answer.")
    page.get_by_label("Query").press("Enter")
    page.wait_for_timeout(200)
    page.unroute("**/v1/embeddings")
    page.get_by_label("Query").press("Enter")
    expect(page.locator("#search-left li")).to_have_count(10, timeout=2000)
    page.route("**/v1/embeddings", lambda route: route.abort())
    page.get_by_label("Query").press("Enter")
    expect(page.locator("#search-left li")).to_have_count(0)
    page.get_by_role("link", name="Now").click()
    page.unroute("**/v1/embeddings")
    page.get_by_role("link", name="Search").click()
    expect(page.locator("#search-left li")).to_have_count(10, timeout=2000)


def test_the_keyboard_alone_is_enough(tab: Opened) -> None:
    """Every view can be reached and used without a pointer, and the focus can be seen."""
    page = tab().open()
    expect(page.locator("#try-status")).to_contain_text("2 vectors")
    press = page.keyboard.press
    press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    press("Enter")
    press("Tab")
    expect(page.get_by_label("Texts, one a line", exact=True)).to_be_focused()
    press("Control+a")
    page.keyboard.type("typed by hand")
    press("Control+Enter")
    expect(page.locator("#try-status")).to_contain_text("1 vector")
    back_to(page, "Search")
    ring = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert ring == "solid"
    press("Enter")
    expect(page.get_by_role("heading", name="Search", exact=True)).to_be_focused()
    assert page.title() == "Search · taskvec"
    press("Tab")
    expect(page.get_by_label("Query")).to_be_focused()
    press("Control+a")
    page.keyboard.type("when do trees get pruned")
    expect(page.locator("#search-left .text").first).to_contain_text("Prune apple trees")
    back_to(page, "Compare")
    press("Enter")
    expect(page.locator("#compare-status")).to_contain_text("24 texts")
    press("Tab")
    expect(page.get_by_label(re.compile("^retrieval.passage: similarities"))).to_be_focused()
    press("ArrowRight")
    expect(page.locator("#compare-readout")).to_contain_text("3: A day ticket is valid")
    expect(page.locator("#announcement")).to_contain_text("2 and 3: ")


def back_to(page: Page, text: str) -> None:
    """Press Shift and Tab until an element with this text has the focus."""
    for _ in range(10):
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.textContent") == text:
            return
    pytest.fail(f"{text} is not reached")


def test_languages_are_chosen_by_arrow_keys(tab: Opened) -> None:
    """The languages are radio buttons: arrow keys move between them."""
    page = tab().open()
    page.get_by_label("curl").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#try-code")).to_contain_text("from openai import OpenAI")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_layouts(tab: Opened, scheme: str, width: int) -> None:
    """In dark and light, on a phone too, texts have contrast, controls names, and all fits."""
    page = tab(color_scheme=scheme, viewport={"width": width, "height": 844}).open()
    papers = set()
    for view in VIEWS:
        page.goto(f"{page.url.partition('#')[0]}#{view}")
        page.wait_for_function(
            """(view) => ({
              try: () => document.querySelectorAll("#try-vectors li").length,
              search: () => document.querySelectorAll("#search-right li").length,
              compare: () => document.querySelectorAll(".heat").length,
              now: () => document.querySelectorAll("#now-figures canvas").length,
            })[view]()""",
            arg=view,
        )
        assert page.evaluate("document.documentElement.scrollWidth") == width, view
        assert page.evaluate(LOW_CONTRASTS) == [], view
        assert page.evaluate(WITHOUT_NAME) == [], view
        papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert papers == {"rgb(252, 251, 249)" if scheme == "light" else "rgb(21, 23, 25)"}


def test_texts_have_their_own_direction(tab: Opened) -> None:
    """Hebrew runs from right to left in fields, rankings, read-outs and tables."""
    page = tab().open()
    hebrew = "\u05e9\u05dc\u05d5\u05dd"

    def direction(selector: str) -> str:
        element = page.locator(selector).filter(has_text=hebrew).first
        expect(element).to_be_visible()
        return str(element.evaluate("(element) => getComputedStyle(element).direction"))

    page.locator("#try-texts").fill(hebrew)
    page.get_by_role("button", name="Embed").click()
    assert direction("#try-vectors .text") == "rtl"
    page.get_by_role("link", name="Search").click()
    page.locator("#search-query").fill(hebrew)
    page.locator("#search-passages").fill(f"{hebrew}\none")
    assert {direction(f"#search-{side} .text") for side in ("left", "right")} == {"rtl"}
    page.get_by_role("link", name="Compare").click()
    page.locator("#compare-texts").fill(f"{hebrew}\none")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#compare-status")).to_contain_text("2 texts")
    page.get_by_text("As a table").click()
    assert direction("#compare-table th bdi") == direction("#compare-table td bdi") == "rtl"
    page.locator(".heat").first.click(position={"x": 3, "y": 3})
    assert direction("#compare-readout bdi") == "rtl"
    fields = page.locator("textarea, #search-query")
    expect(fields).to_have_count(4)
    assert (
        fields.evaluate_all("(all) => all.map((each) => getComputedStyle(each).direction)")
        == ["rtl"] * 4
    )


@pytest.mark.parametrize("touch", [True, False])
def test_hints_fit_the_device(tab: Opened, touch: bool) -> None:
    """Without a mouse, no hint is about keys or pointing; on a phone none is cut."""
    page = tab(viewport={"width": 390, "height": 844}, has_touch=touch, is_mobile=touch).open(
        "/#compare"
    )
    expect(page.locator("#compare-status")).to_contain_text("24 texts")
    assert page.get_by_text("or Ctrl + Enter").last.is_visible() is not touch
    assert page.get_by_text("Point at a square or a dot").is_visible() is not touch
    assert page.get_by_text("Touch a square or a dot").is_visible() is touch
    cut = "(all) => all.filter((each) => each.scrollHeight > each.clientHeight + 1).length"
    assert page.locator("#compare-readout .hint:visible").evaluate_all(cut) == 0


def test_a_screen_reader_finds_its_way(tab: Opened) -> None:
    """There is one heading of the first rank, landmarks, and live regions for what changes."""
    page = tab().open("/#search")
    expect(page.locator("#search-right li")).to_have_count(10)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    for role in ("banner", "navigation", "main", "contentinfo"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("link", name="Search")).to_have_attribute("aria-current", "page")
    expect(page.get_by_role("status").filter(has_text="of the first 10")).to_have_count(1)
    expect(page.get_by_role("list", name="Passages, ranked with the first setting")).to_be_visible()
    assert page.evaluate("document.documentElement.lang") == "en"


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
def test_the_api_description_loads_nothing_from_elsewhere(tab: Opened, path: str) -> None:
    """Swagger UI shows the routes and sends a request, under its policy and from this origin."""
    page = tab().open(path)
    page.get_by_text("/v1/models", exact=True).click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
    expect(page.locator(".live-responses-table")).to_contain_text("matryoshka_dimensions")


def test_the_api_description_asks_for_a_key(tab: Opened, guarded: str) -> None:
    """With keys, the page of the API asks for one, and sends it with its requests."""
    watched = tab(guarded)
    watched.refusals.add(401)
    page = watched.open("/docs")
    expect(page.get_by_role("alert")).to_contain_text("This server requires an API key")
    page.get_by_label("API key").fill(SECRET)
    page.get_by_role("button", name="Use this key").click()
    page.get_by_text("/v1/models", exact=True).click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table")).to_contain_text("matryoshka_dimensions")
