"""The folder for caches of a user without a home directory, as in a container with any user id."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from taskvec.errors import StartError


def home_folder() -> Path:
    """Return the home directory, or a private folder below the temporary one if there is none.

    A home directory counts if caches can be written to it, or have been: an unknown user of a
    container often gets ``/``.

    Raises:
        StartError: there is neither, or the folder in its place belongs to another user.
    """
    try:
        home = Path.home()
    except RuntimeError:  # HOME is not set, and the user id has no entry in /etc/passwd
        return _private_folder()
    if os.access(home / ".cache", os.X_OK) or os.access(home, os.W_OK | os.X_OK):
        return home
    try:
        return _private_folder()
    except StartError:
        return home  # caches that are not necessary are left out where they cannot be written


def set_home() -> None:
    """Set HOME for this process and its children if the user has no home directory.

    The caches of the hub, vLLM and Triton are below it unless they are configured.
    """
    with suppress(StartError):  # what needs a cache raises it again
        os.environ["HOME"] = str(home_folder())


def _private_folder() -> Path:
    """Make a folder in which no other user can put files that this one would then trust."""
    user = os.geteuid()
    remedy = f"set HOME to a folder that user id {user} can write to"
    try:
        folder = Path(tempfile.gettempdir()) / f"taskvec-{user}"
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
    except OSError as error:
        raise StartError(
            f"User id {user} has no home directory, and no temporary folder can be made "
            f"({error.strerror}): {remedy}."
        ) from None
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != user or state.st_mode & 0o077:
        raise StartError(
            f"User id {user} has no home directory, and {folder}, which would be used instead, is "
            f"not a folder of this user alone: remove it, or {remedy}."
        )
    return folder
