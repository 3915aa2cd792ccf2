"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tnnlm_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"tnnlm_{name}", text, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"tnnlm_{name}_seconds", text, buckets=_SECONDS, registry=registry)

        self.responses = counter("responses", "HTTP responses of the API", "status")
        self.finished = counter("texts_finished", "texts by what ended them", "reason")
        self.prompt_tokens = counter("prompt_tokens", "prompt tokens read")
        self.cached_tokens = counter("cached_prompt_tokens", "prompt tokens found in the cache")
        self.new_tokens = counter("new_tokens", "tokens written")
        self.running = gauge("texts_running", "texts being written")
        self.reading = gauge("texts_reading", "texts whose prompt is being read")
        self.waiting = gauge("texts_waiting", "texts that wait")
        self.cache_bytes = gauge("cache_bytes", "bytes of cached states")
        self.state_bytes = gauge("state_bytes", "bytes of state of the texts being written")
        self.step = histogram("step", "one step of the running batch, drawing included")
        self.first_token = histogram("first_token", "from a request to its first token")

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
