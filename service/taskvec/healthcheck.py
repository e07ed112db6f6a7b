"""``python -m taskvec.healthcheck``: readiness check for a container's HEALTHCHECK, without curl.

Sends one request to the server that the same environment variables configure. Uses the standard
library alone: importing the settings would make each check ten times as slow.
"""

from __future__ import annotations

import os
import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection

PATH = "/health/ready"

TIMEOUT_SECONDS = 4.0
"""Timeout of the request; below the HEALTHCHECK's own timeout, so that the reason is printed."""

_LOOPBACK = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104
"""Address to connect to for a host setting that means all addresses."""


def main() -> int:
    """Return exit code 0 if the server is ready; else print the reason and return 1."""
    configured = os.environ.get("TASKVEC_HOST", "").strip("[]")
    host = _LOOPBACK.get(configured, configured)
    port = int(os.environ.get("TASKVEC_PORT") or 8080)
    connection: HTTPConnection
    if os.environ.get("TASKVEC_TLS_CERT"):
        # The certificate is for the names that clients use; this connects to an IP address.
        unverified = ssl._create_unverified_context()  # noqa: S323, SLF001
        connection = HTTPSConnection(host, port, timeout=TIMEOUT_SECONDS, context=unverified)
    else:
        connection = HTTPConnection(host, port, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", PATH)
        response = connection.getresponse()
        text = response.read(4096).decode(errors="replace")
    except (OSError, HTTPException) as error:
        print(f"{host}:{port} does not answer: {error!r}", file=sys.stderr)  # noqa: T201
        return 1
    finally:
        connection.close()
    if response.status != 200:
        print(f"{PATH} is {response.status}: {text}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
