"""Engines turn token ids into vectors."""
