"""Prometheus metrics: one module for each part that reports, composed in ``registry``."""
