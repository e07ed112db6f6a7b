"""Names of the embedding APIs that the service speaks."""

from __future__ import annotations

import enum


class DialectName(enum.StrEnum):
    """One embedding API; a metric label, and a value of a setting."""

    OPENAI = "openai"
    AZURE = "azure"
    COHERE = "cohere"
    GEMINI = "gemini"
    OLLAMA = "ollama"
    TEI = "tei"
    RERANK = "rerank"
