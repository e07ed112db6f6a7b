"""``python -m taskvec.healthcheck``: for a container's HEALTHCHECK, where there is no curl.

Asks the server that the same environment configures whether it is ready. The standard library alone
does it: with all settings read, each look would cost ten times as much.
"""

from __future__ import annotations

import os
import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection

PATH = "/health/ready"
SECONDS = 4.0
"""Less than the patience of the HEALTHCHECK, so that the reason is told."""

_EVERY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104


def main() -> int:
    """Exit code 0 where the server is ready; else 1, and the reason on standard error."""
    listens = os.environ.get("TASKVEC_HOST", "")
    host = _EVERY_ADDRESS.get(listens, listens)
    port = int(os.environ.get("TASKVEC_PORT") or 8080)
    connection: HTTPConnection
    if os.environ.get("TASKVEC_TLS_CERT"):
        # The certificate is for the names that clients use, and this asks by an address.
        trusting = ssl._create_unverified_context()  # noqa: S323, SLF001
        connection = HTTPSConnection(host, port, timeout=SECONDS, context=trusting)
    else:
        connection = HTTPConnection(host, port, timeout=SECONDS)
    try:
        connection.request("GET", PATH)
        answer = connection.getresponse()
        text = answer.read(4096).decode(errors="replace")
    except (OSError, HTTPException) as error:
        print(f"{host}:{port} does not answer: {error!r}", file=sys.stderr)  # noqa: T201
        return 1
    finally:
        connection.close()
    if answer.status != 200:
        print(f"{PATH} is {answer.status}: {text}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
