"""Evaluation of embedding quality: retrieval, STS, classification, clustering, and MTEB."""
