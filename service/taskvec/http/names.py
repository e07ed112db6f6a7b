"""The names by which clients call the served model."""

from __future__ import annotations

from collections.abc import Sequence

from taskvec.errors import NotFoundError


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
