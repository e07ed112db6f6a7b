"""The packed engine: all texts and all tasks of a batch in one forward, without padding."""
