"""Errors of training that a user can fix."""

from __future__ import annotations


class TrainingError(Exception):
    """An error that the user can fix; the message says what happened, where, and what to do."""


class RecipeError(TrainingError):
    """An invalid recipe."""
