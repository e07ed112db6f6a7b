"""Say which permission this process lacks, for messages about files that exist and are not damaged.

Python's own message names neither the user nor the folder on the way that may not be entered.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def denial(path: Path) -> str:
    """Describe why this process may not read a path, after a ``PermissionError``.

    Returns:
        A clause without a full stop: the path, the user id, and the owner and mode of the file or
        of the folder above it that denies the access.
    """
    user = os.geteuid()
    absolute = path.absolute()
    closed = (folder for folder in reversed(absolute.parents) if not os.access(folder, os.X_OK))
    blocking = next(closed, absolute)
    try:
        state = blocking.stat()
    except OSError:
        return f"{path} may not be read by user id {user}: permission denied"
    what = "it" if blocking == absolute else str(blocking)
    return (
        f"{path} may not be read by user id {user}: permission denied, {what} belongs to user id "
        f"{state.st_uid} and has the mode {stat.S_IMODE(state.st_mode):04o}"
    )
