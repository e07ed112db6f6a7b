"""The remote engine: a pool of vLLM servers and taskvec servers."""
