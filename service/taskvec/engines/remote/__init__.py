"""A pool of embedding servers as the engine: stock vLLM servers, or other taskvec servers."""
