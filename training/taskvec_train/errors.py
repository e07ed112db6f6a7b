"""What can go wrong before or while a model is trained."""

from __future__ import annotations


class TrainingError(Exception):
    """A failure that the user can cure: one sentence with what happened, where, and what to do."""


class RecipeError(TrainingError):
    """A recipe that cannot be run as it is written."""
