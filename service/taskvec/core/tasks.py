"""Names that clients use: tasks (an adapter and a prompt each) and models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from taskvec.checkpoint.merged_task import BARE_TASK, MergedTask
from taskvec.errors import InvalidRequestError, NotFoundError

PREFERRED_DEFAULT = "text-matching"
"""Default task of the hosted Jina API."""

MIXED_TASKS = "mixed"
"""What metrics and logs call the task of a request whose texts have several."""

RETRIEVAL, QUERY, PASSAGE = "retrieval", ".query", ".passage"
"""Parts of the names of the tasks of a search."""

ALIASES = {"retrieval": "retrieval.passage", "separation": "clustering"}

INPUT_TYPES = {
    "query": "retrieval.query",
    "search_query": "retrieval.query",
    "document": "retrieval.passage",
    "search_document": "retrieval.passage",
    "classification": "classification",
    "clustering": "clustering",
}
"""Values of ``input_type``, which Voyage, Cohere and Jina clients send instead of a task."""


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and an adapter.

    Attributes:
        name: name that clients use.
        adapter: adapter to apply; None for the bare backbone.
        prompt: prefix of each text before tokenising; may be empty.
    """

    name: str
    adapter: str | None
    prompt: str


class TaskTable:
    """Tasks of a checkpoint.

    Attributes:
        default: task of a request that names none.
    """

    def __init__(
        self,
        adapters: Sequence[str],
        prompts: Mapping[str, str],
        default_prompt: str | None,
        own_prompts: Mapping[str, Mapping[str, str]] | None = None,
        merged_task: MergedTask | None = None,
    ) -> None:
        """Derive the tasks from the adapters.

        The retrieval adapter, and any adapter with its own query prompt, gives two tasks, query and
        passage, and its bare name is an alias of the latter. Every other adapter gives one task,
        with the document prompt. A checkpoint without adapters gives the tasks of the adapter that
        is merged into its weights, or one task with its default prompt.

        Args:
            adapters: adapter names.
            prompts: prompts of the checkpoint, by name.
            default_prompt: name of one of them.
            own_prompts: prompts of an adapter, which replace the checkpoint's.
            merged_task: task of a checkpoint without adapters; None if it has none.
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
        first = 0
        if merged_task is not None and merged_task.query is not None:
            name = merged_task.name
            tasks.append(Task(f"{name}.query", None, merged_task.query))
            tasks.append(Task(f"{name}.passage", None, merged_task.document))
            self._aliases[name] = f"{name}.passage"
            first = 0 if merged_task.query_by_default else 1
        elif merged_task is not None:
            tasks.append(Task(merged_task.name, None, merged_task.document))
            self._aliases.pop(merged_task.name, None)
        elif not tasks:
            prompt = prompts.get(default_prompt, "") if default_prompt else ""
            tasks.append(Task(BARE_TASK, None, prompt))
        self._tasks = {task.name: task for task in tasks}
        self.default = self._tasks.get(PREFERRED_DEFAULT, tasks[first])

    def __iter__(self) -> Iterator[Task]:
        return iter(self._tasks.values())

    @property
    def names(self) -> list[str]:
        """Names of the tasks, in the checkpoint's order."""
        return list(self._tasks)

    def get(self, name: str, *, param: str = "task") -> Task:
        """Return the task with a name or alias.

        Args:
            name: task name.
            param: request field that holds it, for the error.

        Raises:
            InvalidRequestError: unknown task; the message lists the known ones.
        """
        task = self._tasks.get(self._aliases.get(name, name))
        if task is None:
            where = "" if param == "task" else f" for {param}"
            raise InvalidRequestError(
                f"There is no task {name[:80]!r}{where}: this model has {', '.join(self._tasks)}.",
                code="unknown_task",
                param=param,
            )
        return task

    @property
    def both(self) -> list[str]:
        """What the names of two tasks begin with, one of queries and one of passages."""
        queries = [task.removesuffix(QUERY) for task in self._tasks if task.endswith(QUERY)]
        return [query for query in queries if f"{query}{PASSAGE}" in self._tasks]

    def sides(self, name: str | None) -> tuple[Task, Task]:
        """Return the tasks of a query and of the passages that it is compared with.

        Args:
            name: what the two tasks' names begin with; None for ``retrieval``, or without it the
                first that has both.

        Raises:
            InvalidRequestError: there are no such tasks.
        """
        names = self.both
        if name is None and names:
            name = RETRIEVAL if RETRIEVAL in names else names[0]
        if name is None or name not in names:
            served = ", ".join(f"model:{known}" for known in names)
            raise InvalidRequestError(
                f"The task {name[:80]!r} does not tell queries from passages: send {served}."
                if name is not None and names
                else "This model does not tell queries from passages, so it does not rank: it has "
                f"{', '.join(self._tasks)}.",
                code="unknown_task",
                param="model",
            )
        return self._tasks[f"{name}{QUERY}"], self._tasks[f"{name}{PASSAGE}"]

    def choose(self, named: Mapping[str, str | None], where: str = "") -> Task:
        """Return the one task that all fields of a request name, or the default.

        Args:
            named: task name by field, None if absent; ``input_type`` holds an input type instead.
            where: path of the object that has the fields, with a dot at its end, for errors.

        Raises:
            InvalidRequestError: a name is unknown, or two fields name different tasks.
        """
        chosen: Task | None = None
        first = ""
        for key, name in named.items():
            if name is None:
                continue
            field = f"{where}{key}"
            if key == "input_type":
                if name not in INPUT_TYPES:
                    raise InvalidRequestError(
                        f"{field} must be one of {', '.join(INPUT_TYPES)}, got {name[:80]!r}.",
                        code="unknown_task",
                        param=field,
                    )
                task = self.get(INPUT_TYPES[name], param=field)
            else:
                task = self.get(name, param=field)
            if chosen is not None and task is not chosen:
                raise InvalidRequestError(
                    f"{first} names the task {chosen.name}, {field} names {task.name}: name one.",
                    code="conflicting_fields",
                    param=field,
                )
            chosen, first = chosen or task, first or field
        return chosen or self.default


class ServedNames:
    """Names of the served model, and ``name:task`` for clients that can only set the model.

    Attributes:
        primary: name in responses.
        all: every name, the primary one first.
    """

    def __init__(self, primary: str, aliases: Sequence[str]) -> None:
        """Collect the names; the part of a hub id after the slash is also one."""
        self.primary = primary
        self.all = tuple(dict.fromkeys([primary, primary.rpartition("/")[2], *aliases]))

    def task_suffix(self, model: str | None) -> str | None:
        """Return the task in ``name:task``; None for a bare name or None.

        Raises:
            NotFoundError: unknown model.
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
