"""Resolve a model name to a checkpoint: the built-in model, a folder, or a Hugging Face Hub id."""

from __future__ import annotations

import re
from pathlib import Path

from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.errors import CheckpointError

DEFAULT_MODEL = "taskvec-mini"
"""Name of the checkpoint in the package."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DOWNLOADED_FILES = (
    "config.json",
    "config_sentence_transformers.json",
    "modules.json",
    "*/config.json",
    "sentence_*_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "adapters/*/adapter_config.json",
    "adapters/*/adapter_model.safetensors",
    "adapters/*/config_sentence_transformers.json",
)


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint, download it if necessary, and read it.

    Args:
        model: ``taskvec-mini``, a folder, or a hub id such as
            ``jinaai/jina-embeddings-v5-text-small``. An existing folder takes precedence over a
            hub id.
        revision: hub branch, tag or commit; ignored for folders.

    Raises:
        CheckpointError: the model was not found, the hub cannot be reached, or the checkpoint is
            invalid.
    """
    if model == DEFAULT_MODEL:
        return read_checkpoint(Path(__file__).parents[1] / "default_model", DEFAULT_MODEL)
    folder = _folder(model)
    if folder is not None:
        return read_checkpoint(folder, folder.resolve().name)
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model!r} is neither an existing folder nor a hub id of the form owner/name: pass a "
            f"checkpoint folder, a hub id, or the built-in {DEFAULT_MODEL!r}."
        )
    snapshot = _download(model, revision)
    return read_checkpoint(snapshot, model, revision=snapshot.name)


def _folder(model: str) -> Path | None:
    try:
        folder = Path(model).expanduser()
        return folder if model and folder.is_dir() else None
    except (OSError, RuntimeError):  # unknown ~user, or a name too long for the file system
        return None


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow, only for downloads
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=list(_DOWNLOADED_FILES))
        )
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
            f"{model} is not in the local hub cache and could not be downloaded "
            f"({type(error).__name__}): check the network and HF_HUB_OFFLINE, or pass a folder "
            "that contains a copy."
        ) from None
