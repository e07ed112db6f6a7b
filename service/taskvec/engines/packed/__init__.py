"""The packed engine: one forward for all texts and adapters of a batch, without padding."""
