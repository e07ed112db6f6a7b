"""Logs, traces, and the timing of a request's stages."""
