"""Task names: which adapter and which prompt each one means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from taskvec.errors import InvalidRequestError, NotFoundError

PREFERRED_DEFAULT = "text-matching"
"""What the hosted Jina API does where no task is named."""

BARE_TASK = "embedding"
"""The only task of a checkpoint without adapters."""

ALIASES = {"retrieval": "retrieval.passage", "separation": "clustering"}

INPUT_TYPES = {
    "query": "retrieval.query",
    "search_query": "retrieval.query",
    "document": "retrieval.passage",
    "search_document": "retrieval.passage",
    "classification": "classification",
    "clustering": "clustering",
}
"""What Voyage, Cohere and Jina clients say instead of a task."""


@dataclass(frozen=True, slots=True)
class Task:
    """One way to embed a text: the prompt put before it and the adapter applied.

    Attributes:
        adapter: None for the bare backbone.
        prompt: prefix joined to the text before tokenising; may be empty.
    """

    name: str
    adapter: str | None
    prompt: str


class TaskTable:
    """The tasks that a checkpoint offers."""

    def __init__(
        self,
        adapters: Sequence[str],
        prompts: Mapping[str, str],
        default_prompt: str | None,
        own_prompts: Mapping[str, Mapping[str, str]] | None = None,
    ) -> None:
        """Derive the tasks.

        The retrieval adapter, and any with a query prompt of its own, gives two tasks, one a side,
        and its bare name means the passages; every other adapter gives one, with the document
        prompt; a checkpoint without adapters gives one, with its default prompt.

        Args:
            adapters: their names.
            prompts: of the checkpoint.
            default_prompt: the name of one of them.
            own_prompts: adapter -> prompts in place of the checkpoint's.
        """
        tasks, self._aliases = [], dict(ALIASES)
        for adapter in adapters:
            own = (own_prompts or {}).get(adapter, {})
            document = own.get("document", prompts.get("document", ""))
            if adapter == "retrieval" or "query" in own:
                query = own.get("query", prompts.get("query", ""))
                tasks.append(Task(f"{adapter}.query", adapter, query))
                tasks.append(Task(f"{adapter}.passage", adapter, document))
                self._aliases[adapter] = f"{adapter}.passage"
            else:
                tasks.append(Task(adapter, adapter, document))
        if not tasks:
            prompt = prompts.get(default_prompt, "") if default_prompt else ""
            tasks.append(Task(BARE_TASK, None, prompt))
        self._tasks = {task.name: task for task in tasks}
        self.default = self._tasks.get(PREFERRED_DEFAULT, tasks[0])

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    @property
    def names(self) -> list[str]:
        """Task names, in the checkpoint's order."""
        return list(self._tasks)

    def get(self, name: str, *, param: str = "task") -> Task:
        """The task of this name or alias.

        Raises:
            InvalidRequestError: there is none; the message lists those there are.
        """
        task = self._tasks.get(self._aliases.get(name, name))
        if task is None:
            raise InvalidRequestError(
                f"There is no task {name[:80]!r}: this model has {', '.join(self._tasks)}.",
                code="unknown_task",
                param=param,
            )
        return task

    def choose(self, named: Mapping[str, str | None]) -> Task:
        """The one task that all the fields of a request name, or the default.

        Args:
            named: field -> task name; ``input_type`` holds an input type instead; None is silence.

        Raises:
            InvalidRequestError: a name is unknown, or two fields name different tasks.
        """
        chosen: Task | None = None
        by = ""
        for field, name in named.items():
            if name is None:
                continue
            if field == "input_type":
                if name not in INPUT_TYPES:
                    raise InvalidRequestError(
                        f"input_type {name[:80]!r} is none of {', '.join(INPUT_TYPES)}.",
                        code="unknown_task",
                        param=field,
                    )
                task = self.get(INPUT_TYPES[name], param=field)
            else:
                task = self.get(name, param=field)
            if chosen is not None and task is not chosen:
                raise InvalidRequestError(
                    f"{by} asks for the task {chosen.name}, {field} for {task.name}: name one.",
                    code="conflicting_fields",
                    param=field,
                )
            chosen, by = chosen or task, by or field
        return chosen or self.default


class ServedNames:
    """The model's name, its aliases, and ``name:task`` for clients that can set nothing else."""

    def __init__(self, primary: str, aliases: Sequence[str]) -> None:
        """Collect the names; of a hub id, what follows the slash is a name too."""
        self.primary = primary
        self.all = tuple(dict.fromkeys([primary, primary.rpartition("/")[2], *aliases]))

    def task_suffix(self, model: str | None) -> str | None:
        """The task named behind a colon; None where the model stands alone or is not named.

        Raises:
            NotFoundError: no model of this name is served.
        """
        if model is None or model in self.all:
            return None
        name, colon, task = model.rpartition(":")
        if not colon or name not in self.all:
            raise NotFoundError(
                f"There is no model {model[:200]!r}: this server has {', '.join(self.all)}.",
                code="model_not_found",
                param="model",
            )
        return task
