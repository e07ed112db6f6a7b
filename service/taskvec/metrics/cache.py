"""Metrics of the embedding cache; see ``taskvec.cache.embeddings.CacheObserver``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class CacheMetrics:
    """Observer of an embedding cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        """Declare the metrics in a registry."""
        texts = Counter(
            "taskvec_cache_texts",
            "How many texts were looked up in the answer cache: found (hit) or not (miss)?",
            ("outcome",),
            registry=registry,
        )
        self._cache_hits, self._cache_misses = texts.labels("hit"), texts.labels("miss")
        self._cache_hit_tokens = Counter(
            "taskvec_cache_hit_tokens",
            "How many tokens did the answer cache save the engine?",
            registry=registry,
        )
        self._cache_bytes = Gauge(
            "taskvec_cache_bytes",
            "How much memory does the answer cache use (0: disabled, or stored in Redis)?",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self._cache_failures = Counter(
            "taskvec_cache_failures",
            "How many calls to the answer cache's Redis failed or were skipped as it was slow?",
            registry=registry,
        )

    def cache_lookup(self, *, hits: int, misses: int, hit_tokens: int) -> None:
        """Count one lookup; see ``CacheObserver``."""
        self._cache_hits.inc(hits)
        self._cache_misses.inc(misses)
        self._cache_hit_tokens.inc(hit_tokens)

    def cache_size(self, size: int) -> None:
        """Set the size of the cache in bytes; see ``CacheObserver``."""
        self._cache_bytes.set(size)

    def cache_failed(self) -> None:
        """Count one failed or skipped call to Redis; see ``CacheObserver``."""
        self._cache_failures.inc()
