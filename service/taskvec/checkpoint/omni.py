"""jina-embeddings-v5-omni: models for several media, of which taskvec could serve the text only.

Their text vectors equal those of jina-embeddings-v5-text at the same task, but the names of their
tensors are not published where they could be checked: a guess could give wrong vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from taskvec.errors import CheckpointError

_FAMILY = "jina-embeddings-v5-omni"
_SIZES = ("small", "nano")
_PARTS = ("text_config", "vision_config", "audio_config")
"""Objects in the config.json of a model with several towers."""


def states_omni(config: Mapping[str, Any]) -> str | None:
    """Return what in a config.json states an omni model; None if nothing does."""
    classes = config.get("architectures")
    values = [config.get("model_type"), *(classes if isinstance(classes, list) else [])]
    stated = [value for value in values if isinstance(value, str) and "jina" in value.lower()]
    for value in stated:
        if "omni" in value.lower():
            return f"the type {value!r}"
    parts = [name for name in _PARTS if isinstance(config.get(name), dict)]
    return f"the part {parts[0]}" if stated and parts else None


def is_omni_name(names: Iterable[str]) -> bool:
    """Return whether one of a checkpoint's names is that of an omni repository."""
    return any(_FAMILY in name.lower() for name in names)


def omni_error(names: Iterable[str], reason: str) -> CheckpointError:
    """Return the error for an omni checkpoint.

    Args:
        names: names of the checkpoint.
        reason: why it is taken for one, or why its text part cannot be read.
    """
    sizes = [size for size in _SIZES if any(size in name.lower() for name in names)]
    models = " or ".join(f"jinaai/jina-embeddings-v5-text-{size}" for size in sizes[:1] or _SIZES)
    return CheckpointError(
        f"This is a {_FAMILY} checkpoint, for text and other media ({reason}), and taskvec cannot "
        f"know which of its tensors make the text vectors: serve {models}, whose text vectors are "
        "the same for the same task."
    )
