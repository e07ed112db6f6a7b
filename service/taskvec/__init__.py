"""taskvec: text embeddings with a task adapter selected per request."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskvec.library import AsyncEmbedder, Embedder

__version__ = "0.1.0"
__all__ = ["AsyncEmbedder", "Embedder", "__version__"]


def __getattr__(name: str) -> Any:
    """Import a class on first use: importing a submodule must not import the engine."""
    if name in ("AsyncEmbedder", "Embedder"):
        return getattr(importlib.import_module("taskvec.library"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
