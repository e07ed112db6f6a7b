"""The HTTP dialects: bytes in, one job, bytes out."""
