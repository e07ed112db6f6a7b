"""How the open files of a process are divided, under limits of the system."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from taskvec.open_files import MAX_CONNECTING, MIN_CONNECTING, OTHER_FILES

PRINT = """
import json, resource, sys
from taskvec.open_files import divide_open_files
shares = divide_open_files(int(sys.argv[1]), remote=False)
soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
print(json.dumps([shares.clients, shares.connecting, soft]))
"""


@pytest.mark.parametrize(
    ("limit", "connections", "clients", "connecting"),
    [
        (2048, 1000, 1000, MAX_CONNECTING),
        (1000 + OTHER_FILES + 50, 1000, 1000, MIN_CONNECTING + 50),
        (256, 4096, 256 - OTHER_FILES, MIN_CONNECTING),
    ],
)
def test_shares(limit: int, connections: int, clients: int, connecting: int) -> None:
    """Accepting takes what clients leave; what all may open together is within the limit."""
    command = [sys.executable, "-c", PRINT, str(connections)]
    shell = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *command]
    shown = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    *shares, soft = json.loads(shown)
    assert shares == [clients, connecting]
    assert clients + connecting + OTHER_FILES - MIN_CONNECTING <= soft <= limit
