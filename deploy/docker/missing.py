"""Print the lines of a lock file whose packages are not installed here.

Used as pip constraints, they give packages that are added to an image their locked versions, and
leave installed packages unchanged.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing(lock: str) -> list[str]:
    """Return ``name==version`` for each package of a requirements file that is not installed."""
    return [
        line for line in re.findall(r"^[\w.-]+==\S+", lock, re.MULTILINE) if not _installed(line)
    ]


def _installed(requirement: str) -> bool:
    try:
        version(requirement.partition("==")[0])
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    print("\n".join(missing(Path(sys.argv[1]).read_text())))
