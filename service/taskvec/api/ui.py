"""GET /: a page that shows the service to a person, and its files below /ui.

The files have nothing of the service in them, so they need no API key: the page asks for one, and
sends it with its own requests, to the routes that every client uses.
"""

from __future__ import annotations

from pathlib import Path

from taskvec.api.endpoint import Route
from taskvec.api.static_files import content_security_policy, static_handler

FOLDER = Path(__file__).parents[1] / "ui"

PAGE = "index.html"

FILES = (
    "app.css",
    "app.js",
    "charts.js",
    "client.js",
    "compare.js",
    "elements.js",
    "icon.svg",
    "metrics.js",
    "now.js",
    "retry.js",
    "samples.js",
    "search.js",
    "snippets.js",
    "try.js",
    "vectors.js",
)
"""Files that the page loads."""

POLICY = content_security_policy(require_trusted_types_for="'script'")


def routes() -> list[Route]:
    """Return the routes of the page and of each of its files."""
    paths = {"/": PAGE} | {f"/ui/{name}": name for name in FILES}
    return [
        Route(
            path=path,
            handler=static_handler(name, (FOLDER / name).read_bytes, POLICY),
            public=True,
            documented=False,
        )
        for path, name in paths.items()
    ]
