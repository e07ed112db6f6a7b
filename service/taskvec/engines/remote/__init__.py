"""The remote engine: a pool of embedding servers, either stock vLLM servers or taskvec servers."""
