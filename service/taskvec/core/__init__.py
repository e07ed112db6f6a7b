"""Embedding jobs: tokenise, admit, embed, post-process; no HTTP, no torch."""
