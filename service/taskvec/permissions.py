"""Say why a path cannot be read: which permission this process lacks, and where.

Python's own message names neither the user nor the folder above that may not be entered.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_failure(path: Path, error: OSError) -> str:
    """Describe why a path cannot be read.

    Args:
        path: what was to be read.
        error: the error.

    Returns:
        A clause without a full stop. For a ``PermissionError`` it has the user id, and owner and
        mode of the file, or of the folder above it that denies the access.
    """
    if not isinstance(error, PermissionError):
        return error.strerror or str(error)
    denied = f"permission denied to user id {os.geteuid()}"
    absolute = path.absolute()
    closed = (folder for folder in reversed(absolute.parents) if not os.access(folder, os.X_OK))
    blocking = next(closed, absolute)
    try:
        state = blocking.stat()
    except OSError:
        return denied
    what = "it" if blocking == absolute else f"the folder {blocking}"
    mode = stat.S_IMODE(state.st_mode)
    return f"{denied}, {what} belongs to user id {state.st_uid} and has the mode {mode:04o}"
