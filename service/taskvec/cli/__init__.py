"""The command line: serve, embed, eval, check, key."""
