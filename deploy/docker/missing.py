"""Prints the lines of a lock whose packages are not installed here.

As constraints they give what is added to an image the locked versions, and leave what is there.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing(lock: str) -> list[str]:
    """``name==version`` of each package of a requirements file that is not installed."""
    return [line for line in re.findall(r"^[\w.-]+==\S+", lock, re.MULTILINE) if not _there(line)]


def _there(requirement: str) -> bool:
    try:
        version(requirement.partition("==")[0])
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    print("\n".join(missing(Path(sys.argv[1]).read_text())))
