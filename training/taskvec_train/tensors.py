"""Write weights to safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file with the permissions of the umask.

    ``save_file`` alone makes files that only their owner can read, so that a container of another
    user cannot serve them.

    Args:
        tensors: contiguous, on any device.
        file: replaced if it exists.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    file.touch()
    mode = file.stat().st_mode
    save_file(dict(tensors), file)
    file.chmod(mode)
