"""Counts and times of a server, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

__all__ = ["CONTENT_TYPE", "Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one server; a process may have several. Safe to use from several threads."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU time and open files, on Linux

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"prlhf_{name}", help_, labels, registry=registry)

        def histogram(name: str, help_: str, *labels: str) -> Histogram:
            return Histogram(f"prlhf_{name}", help_, labels, buckets=_SECONDS, registry=registry)

        self.http_requests = counter("http_requests_total", "Answered requests.", "method", "route", "status")
        self.http_seconds = histogram("http_request_seconds", "Time from a request to the end of its answer.", "route")
        self.first_token_seconds = histogram("first_token_seconds", "Time from a request for text to its first text.")
        self.generated_tokens = counter("generated_tokens_total", "Generated tokens.")
        self.engine_step_seconds = histogram(
            "engine_step_seconds", "Time of an engine step, which generates one token of each running text."
        )
        self.engine_failures = counter("engine_failures_total", "Failed engine steps; each ends all running texts.")
        self.feedback = counter("feedback_total", "Stored feedback, by kind.", "kind")
        self.ranked_documents = counter("ranked_documents_total", "Documents ranked by the reward model.")
        self.unknown_users = counter("unknown_users_total", "Unknown users in requests, served as the generic user.")
        self.open_requests = Gauge(
            "prlhf_open_requests", "Requests for text that are waiting or running.", registry=registry
        )

    def render(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self._registry)
