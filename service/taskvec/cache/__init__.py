"""Cache of embeddings, in memory or in Redis."""
