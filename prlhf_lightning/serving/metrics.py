"""Counts and times, in Prometheus' text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from threading import Lock

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
_HELP = {
    "prlhf_http_requests_total": "Answered requests.",
    "prlhf_http_request_seconds": "Time from a request to the end of its answer.",
    "prlhf_first_token_seconds": "Time from a request for text to the first of it.",
    "prlhf_generated_tokens_total": "Tokens written.",
    "prlhf_engine_step_seconds": "Time of a step of the engine: a token for all that are being written.",
    "prlhf_engine_failures_total": "Steps that failed, and with them all that was being written.",
    "prlhf_feedback_total": "Feedback written down, by kind.",
    "prlhf_unknown_users_total": "Users of requests whom the model does not know; the generic user stood in.",
    "prlhf_open_requests": "Requests for text that are waiting or being written.",
}
_Key = tuple[str, tuple[tuple[str, str], ...]]


class Metrics:
    """Counters, histograms and gauges by name and labels. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counters: dict[_Key, float] = {}
        self._histograms: dict[_Key, tuple[list[int], float]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            self._counters[key] = self._counters.get(key, 0) + by

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add a time to a histogram."""
        key = (name, tuple(sorted(labels.items())))
        with self._lock:
            counts, total = self._histograms.setdefault(key, ([0] * (len(_BOUNDS) + 1), 0.0))
            counts[bisect_left(_BOUNDS, seconds)] += 1
            self._histograms[key] = (counts, total + seconds)

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Have a value read whenever somebody asks."""
        self._gauges[name] = read

    def render(self) -> str:
        """Return everything in Prometheus' text format."""
        lines: list[str] = []
        with self._lock:
            counters, histograms = dict(self._counters), {k: (list(c), t) for k, (c, t) in self._histograms.items()}
        for name in sorted({name for name, _ in counters}):
            lines += [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} counter"]
            lines += [f"{n}{_labels(labels)} {value:.15g}" for (n, labels), value in counters.items() if n == name]
        for name in sorted({name for name, _ in histograms}):
            lines += [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} histogram"]
            for (n, labels), (counts, total) in histograms.items():
                if n == name:
                    lines += _histogram(name, labels, counts, total)
        for name, read in self._gauges.items():
            lines += [f"# HELP {name} {_HELP[name]}", f"# TYPE {name} gauge", f"{name} {read():.15g}"]
        return "\n".join(lines) + "\n"


def _histogram(name: str, labels: tuple[tuple[str, str], ...], counts: list[int], total: float) -> list[str]:
    lines, reached = [], 0
    for bound, count in zip([*(f"{bound:g}" for bound in _BOUNDS), "+Inf"], counts, strict=True):
        reached += count
        lines.append(f"{name}_bucket{_labels((*labels, ('le', bound)))} {reached}")
    return [*lines, f"{name}_sum{_labels(labels)} {total:.6f}", f"{name}_count{_labels(labels)} {reached}"]


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    escape = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
    return "{" + ",".join(f'{name}="{value.translate(escape)}"' for name, value in labels) + "}" if labels else ""
