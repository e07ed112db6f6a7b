"""The engine in a process of its own: token ids in, vectors out, over a Unix socket."""
