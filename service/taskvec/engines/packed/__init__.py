"""The packed engine: one forward pass for all texts and adapters of a batch, without padding."""
