"""Commands with fewer rights than the tests, which may run as root."""

from __future__ import annotations

import os
import sys

UNKNOWN_USER = 54_321
"""User id without an entry in /etc/passwd."""

_DROP = """
import ctypes, os, sys
PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_NET_BIND_SERVICE = 1, 2, 10
for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_NET_BIND_SERVICE):
    ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def unprivileged(*command: str) -> list[str]:
    """Return a command that runs another one without root's rights to files and ports.

    The user id stays 0: all users must be able to enter the folders above the Python installation.
    """
    return [sys.executable, "-c", _DROP, *command] if os.geteuid() == 0 else list(command)
