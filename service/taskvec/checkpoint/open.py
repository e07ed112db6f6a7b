"""From what a user names to a folder: the built-in model, a path, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.errors import CheckpointError

DEFAULT_MODEL = "taskvec-mini"
"""The checkpoint inside the package."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED_FILES = (
    "config.json",
    "config_sentence_transformers.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapters/*/adapter_config.json",
    "adapters/*/adapter_model.safetensors",
    "adapters/*/config_sentence_transformers.json",
)


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and read it.

    Args:
        model: ``taskvec-mini``, a folder, or a hub id such as
            ``jinaai/jina-embeddings-v5-text-small``. An existing folder wins over a hub id.
        revision: hub branch, tag or commit; ignored for folders.

    Raises:
        CheckpointError: nothing is there, the hub cannot be reached, or the files cannot be served.
    """
    if model == DEFAULT_MODEL:
        return read_checkpoint(Path(__file__).parents[1] / "default_model", DEFAULT_MODEL)
    folder = _folder(model)
    if folder is not None:
        return read_checkpoint(folder, folder.resolve().name)
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"There is no folder {model!r}, and it is no hub id of the form owner/name: name an "
            f"existing checkpoint folder, a hub id, or the built-in {DEFAULT_MODEL!r}."
        )
    snapshot = _download(model, revision)
    return read_checkpoint(snapshot, model, revision=snapshot.name)


def _folder(model: str) -> Path | None:
    try:
        folder = Path(model).expanduser()
        return folder if model and folder.is_dir() else None
    except (OSError, RuntimeError):  # no such user, a name too long for the file system
        return None


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow, and only hubs need it
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(_WANTED_FILES)))
    except HFValidationError as error:
        raise CheckpointError(f"{model!r} cannot be a hub id: {error}") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"The hub has no revision {revision!r} of {model}.") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"The hub has no model {model}, or it needs a token: check the name and set HF_TOKEN."
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{model} is neither in the local hub cache nor could it be fetched "
            f"({type(error).__name__}): check the network or HF_HUB_OFFLINE, or name a folder that "
            "holds a copy."
        ) from None
