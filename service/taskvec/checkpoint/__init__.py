"""Reading a checkpoint folder: config, weights, adapters, prompts."""
