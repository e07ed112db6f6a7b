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

_BECOME = f"""
import ctypes, os, struct, sys
PR_SET_KEEPCAPS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 8, 47, 2
CAP_DAC_READ_SEARCH = 2
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result:
        raise OSError(ctypes.get_errno(), "this process cannot become another user")
check(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0))
os.setgroups([])
os.setresgid({UNKNOWN_USER}, {UNKNOWN_USER}, {UNKNOWN_USER})
os.setresuid({UNKNOWN_USER}, {UNKNOWN_USER}, {UNKNOWN_USER})
bit = 1 << CAP_DAC_READ_SEARCH
version_3 = struct.pack("Ii", 0x20080522, 0)
if libc.capset(version_3, struct.pack("6I", bit, bit, bit, 0, 0, 0)) == 0:
    check(libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_READ_SEARCH, 0, 0))
os.execv(sys.argv[1], sys.argv[1:])
"""


def unprivileged(*command: str) -> list[str]:
    """Return a command that runs another one without root's rights to files and ports.

    The user id stays 0: all users must be able to enter the folders above the Python installation.
    """
    return [sys.executable, "-c", _DROP, *command] if os.geteuid() == 0 else list(command)


def as_unknown_user(*command: str) -> list[str]:
    """Return a command that root runs as a user without an entry in /etc/passwd.

    The user may read every file, because the Python installation may be in root's home directory,
    unless root itself has not that right, as in some containers.
    """
    return [sys.executable, "-c", _BECOME, *command]
