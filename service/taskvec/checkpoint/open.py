"""Resolve a model name to a checkpoint: the built-in model, a folder, or a Hugging Face Hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path

from taskvec.checkpoint.checkpoint import Checkpoint, read_checkpoint
from taskvec.checkpoint.files import is_folder, list_folder, name_denial
from taskvec.errors import CheckpointError
from taskvec.home import home_folder

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


def open_checkpoint(
    model: str, revision: str | None = None, task_name: str | None = None
) -> Checkpoint:
    """Find a checkpoint, download it if necessary, and read it.

    Args:
        model: ``taskvec-mini``, a folder, or a hub id such as
            ``jinaai/jina-embeddings-v5-text-small``. An existing folder takes precedence over a
            hub id.
        revision: hub branch, tag or commit; ignored for folders.
        task_name: task of a checkpoint without adapters; see ``read_checkpoint``.

    Raises:
        CheckpointError: the model was not found or may not be read, the hub cannot be reached, or
            the checkpoint is invalid.
        StartError: the hub's cache has no place; see ``taskvec.home``.
    """
    if model == DEFAULT_MODEL:
        built_in = Path(__file__).parents[1] / "default_model"
        return read_checkpoint(built_in, DEFAULT_MODEL, task_name=task_name)
    folder = _folder(model)
    if folder is not None:
        return read_checkpoint(folder, folder.resolve().name, task_name=task_name)
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model!r} is neither an existing folder nor a hub id of the form owner/name: pass a "
            f"checkpoint folder, a hub id, or the built-in {DEFAULT_MODEL!r}."
        )
    snapshot = _download(model, revision)
    return read_checkpoint(snapshot, model, snapshot.name, task_name)


def _folder(model: str) -> Path | None:
    try:
        folder = Path(model).expanduser()
    except RuntimeError:  # unknown ~user
        return None
    return folder if model and is_folder(folder) else None


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - slow, only for downloads
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cache = _hub_cache()
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                cache_dir=cache,
                allow_patterns=list(_DOWNLOADED_FILES),
            )
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
        _check_cache(error, Path(cache or HF_HUB_CACHE), model)
        raise CheckpointError(
            f"{model} is not in the local hub cache and could not be downloaded "
            f"({type(error).__name__}): check the network and HF_HUB_OFFLINE, or pass a folder "
            "that contains a copy."
        ) from None


def _hub_cache() -> Path | None:
    """Return the hub's cache if the user has no home directory; None for the hub's own choice."""
    if any(map(os.environ.get, ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"))):
        return None
    try:
        Path.home()
    except RuntimeError:
        return home_folder() / ".cache" / "huggingface" / "hub"
    return None


def _check_cache(error: Exception, cache: Path, model: str) -> None:
    """Find out whether the hub's cache is why a model was neither found nor stored.

    Raises:
        CheckpointError: this process may not read the model there, or cannot write.
    """
    folder = cache / f"models--{model.replace('/', '--')}"
    for part in (folder, folder / "refs", folder / "snapshots", folder / "blobs"):
        list_folder(part)
    if isinstance(error, OSError) and error.filename is not None:
        path = Path(os.fsdecode(error.filename))
        with name_denial(path):
            if isinstance(error, PermissionError):
                raise error
        raise CheckpointError(
            f"{model} cannot be stored in the hub's cache: {path}: {error.strerror}: set HF_HOME "
            "to a writable folder with free space."
        ) from None
