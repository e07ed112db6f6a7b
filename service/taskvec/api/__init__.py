"""HTTP routes: request bytes to an embedding job, vectors to response bytes."""
