"""Read a checkpoint folder: config, weights, adapters and prompts."""
