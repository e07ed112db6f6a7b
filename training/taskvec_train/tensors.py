"""Weights as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file that may be read by whom the umask says, as any other file.

    ``save_file`` alone lets nobody but the writer read it, so no container of another user.

    Args:
        tensors: contiguous, on any device.
        file: is replaced.

    Raises:
        OSError, SafetensorError: the disk refuses it.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file)
    file.chmod(mode)
