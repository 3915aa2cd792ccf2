"""Prometheus metrics of the server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """Metrics of one server, in a separate registry."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tnnlm_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"tnnlm_{name}", text, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"tnnlm_{name}_seconds", text, buckets=_SECONDS, registry=registry)

        self.responses = counter("responses", "Number of HTTP responses of the API by status", "status")
        self.finished = counter("texts_finished", "Number of finished sequences by finish reason", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Number of prefill tokens processed")
        self.cached_tokens = counter(
            "cached_prompt_tokens", "Number of prompt tokens found in the prefix cache"
        )
        self.new_tokens = counter("new_tokens", "Number of generation tokens processed")
        self.running = gauge("texts_running", "Number of sequences in the running batch")
        self.reading = gauge("texts_reading", "Number of sequences in prefill")
        self.waiting = gauge("texts_waiting", "Number of sequences waiting to be processed")
        self.cache_bytes = gauge("cache_bytes", "Size of the prefix cache in bytes")
        self.state_bytes = gauge("state_bytes", "Size of the states of the running batch in bytes")
        self.step = histogram(
            "step", "Duration of one step of the running batch in seconds, sampling included"
        )
        self.first_token = histogram("first_token", "Time to first token in seconds")

    def set_load(self, counts: dict[str, int], state_bytes: int, cache_bytes: int) -> None:
        """Set the gauges: numbers of sequences by their name, and sizes in bytes."""
        for name, count in counts.items():
            getattr(self, name).set(count)
        self.state_bytes.set(state_bytes)
        self.cache_bytes.set(cache_bytes)

    def text(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)
