"""The task of a checkpoint without adapters, into whose weights one adapter was merged.

Repositories such as ``jina-embeddings-v5-text-nano-retrieval`` have the config of a plain backbone.
Their prompts show that texts need a prefix; only their name says which task the weights have.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from taskvec.errors import CheckpointError

BARE_TASK = "embedding"
"""Task of a checkpoint without adapters whose prompts, name and options name none."""

RETRIEVAL = "retrieval"

ONE_SIDED_TASKS = frozenset({"text-matching", "clustering", "classification"})
"""Tasks whose texts all get the document prompt."""

TASK_NAME = "[A-Za-z0-9][A-Za-z0-9_-]*"
"""Regular expression of a task's name. A dot would separate it from query and passage."""

_SUFFIX = re.compile(
    r"(?:.*[-_.])?(?:(retrieval)|(text)[-_](matching)|(clustering)|(classification))", re.IGNORECASE
)
_DOCUMENT_PROMPTS = ("document", "passage", "corpus")
"""Names of the prompt for documents, in the order in which sentence-transformers looks for them."""


@dataclass(frozen=True, slots=True)
class MergedTask:
    """The task that the weights were made for.

    Attributes:
        name: ``retrieval``, or another name without a dot.
        query: prefix of queries; None if the task has the same prefix for all texts.
        document: prefix of all other texts.
        query_by_default: True if a request that names no task embeds a query.
        source: what names the task, for the operator.
        assumed: True if only the prompts do.
    """

    name: str
    query: str | None
    document: str
    query_by_default: bool
    source: str
    assumed: bool


def repository_names(folder: Path, name: str) -> list[str]:
    """Return the names of a checkpoint: those of its hub id, its folder and its hub cache.

    Args:
        folder: as the operator named it; a link also has the name of the folder that it points to.
        name: name of the model in the API.
    """
    return list(dict.fromkeys(filter(None, _names(folder, name))))


def _names(folder: Path, name: str) -> Iterator[str]:
    yield name.rpartition("/")[2]
    for path in (folder.absolute(), folder.resolve()):
        yield path.name
        if path.parent.name == "snapshots":  # models--owner--name/snapshots/commit
            yield path.parents[1].name.rpartition("--")[2]


def find_merged_task(
    names: list[str],
    prompts: Mapping[str, str],
    default_prompt: str | None,
    stated: str | None,
    source: str,
) -> MergedTask | None:
    """Return the task of a checkpoint without adapters; None for a backbone without a task.

    The operator's word counts most, then the end of the repository's name. Without either, prompts
    for queries and documents mean retrieval.

    Args:
        names: see ``repository_names``.
        prompts: prompts of the checkpoint, by name.
        default_prompt: name of one of them.
        stated: the task by the operator's word; ``embedding`` for none.
        source: name of the prompts file in error messages.

    Raises:
        CheckpointError: the names contradict each other, or the prompts of the task are missing.
    """
    query = prompts.get("query")
    document = next((prompts[key] for key in _DOCUMENT_PROMPTS if key in prompts), None)
    found: dict[str, str] = {}
    if stated is not None:
        if not re.fullmatch(TASK_NAME, stated):
            raise CheckpointError(
                f"{stated[:80]!r} cannot be the task of a model: pass the name of its adapter, "
                "such as retrieval (for retrieval.query and retrieval.passage) or clustering."
            )
        if stated == BARE_TASK:
            return None
        task, origin = stated, "--task-name"
    elif not query and not document:
        return None  # sentence-transformers writes empty prompts for a model that needs none
    else:
        found = {suffix: name for name in names if (suffix := _suffix(name)) is not None}
        if len(found) > 1:
            raise CheckpointError(
                f"The names {' and '.join(map(repr, found.values()))} of this checkpoint name "
                f"different tasks, {' and '.join(found)}: set --task-name to the right one."
            )
        if not found and (query is None or document is None):
            return None
        task = next(iter(found), RETRIEVAL)
        origin = f"the name {found[task]}" if found else f"the prompts in {source}"
    if document is None or (task == RETRIEVAL and query is None):
        needed = "'query' and 'document'" if task == RETRIEVAL else "'document'"
        raise CheckpointError(
            f"{origin} says that this model is for {task}, but {source} lacks the prompts "
            f"{needed}: copy or download that file, or set --task-name {BARE_TASK} to serve the "
            "model as one task without them."
        )
    return MergedTask(
        name=task,
        query=None if task in ONE_SIDED_TASKS else query,
        document=document,
        query_by_default=default_prompt == "query",
        source=origin,
        assumed=stated is None and not found,
    )


def _suffix(name: str) -> str | None:
    match = _SUFFIX.fullmatch(name)
    return "-".join(part.lower() for part in match.groups() if part) if match else None
