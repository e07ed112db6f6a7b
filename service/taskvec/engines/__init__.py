"""Engines compute vectors from token ids."""
