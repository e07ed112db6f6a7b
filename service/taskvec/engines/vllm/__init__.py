"""vLLM as the engine: token ids in, an adapter per request."""
