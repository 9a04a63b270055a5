"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

if TYPE_CHECKING:
    from ffjax.serve.job import Job

__all__ = ["CONTENT_TYPE", "Metrics"]

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Seconds: from a small model on a large GPU to a large one on a CPU.
_TO_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self):
        """All at zero."""
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self._answers = Counter(
            "ffjax_http_requests_total", "Requests answered.", ("path", "status"), **own
        )
        self._ended = Counter(
            "ffjax_sequences_total",
            "Texts asked for, by outcome: stop, length, cancelled, failed, refused.",
            ("outcome",),
            **own,
        )
        self._waiting = Gauge("ffjax_sequences_waiting", "Texts that wait for a row.", **own)
        self._running = Gauge("ffjax_sequences_running", "Texts being written.", **own)
        self._prompt = Counter("ffjax_prompt_tokens_total", "Tokens of prompts.", **own)
        self._cached = Counter(
            "ffjax_prompt_tokens_cached_total", "Tokens of prompts found in a row's cache.", **own
        )
        self._new = Counter("ffjax_generation_tokens_total", "Tokens generated.", **own)
        self._accepted = Counter(
            "ffjax_generation_tokens_accepted_total",
            "Tokens generated that were drafts which were right.",
            **own,
        )
        self._to_first = Histogram(
            "ffjax_time_to_first_token_seconds",
            "From a request to its first token, waiting included.",
            buckets=_TO_FIRST,
            **own,
        )
        self._between = Histogram(
            "ffjax_time_between_tokens_seconds",
            "A token, from one block of steps to the next: once a block and text.",
            buckets=_BETWEEN,
            **own,
        )
        self.batch_failures = Counter(
            "ffjax_batch_failures_total", "Times that the batch failed and was made anew.", **own
        )
        for outcome in ("stop", "length", "cancelled", "failed", "refused"):
            self._ended.labels(outcome)  # there from the beginning, at 0

    def watch(self, *, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Says where the lengths of the queue and of the batch are read."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)

    def answered(self, path: str, status: int) -> None:
        """A request was answered."""
        self._answers.labels(path, str(status)).inc()

    def ended(self, outcome: str) -> None:
        """A text is complete, or was given up."""
        self._ended.labels(outcome).inc()

    def came(self, job: Job, count: int, accepted: int, before: float | None) -> None:
        """New tokens of a text have come.

        Args:
            job: the text.
            count: how many.
            accepted: of them those that were drafts.
            before: when the last ones came; None: these are the first.
        """
        if not count or job.last is None:
            return
        self._new.inc(count)
        self._accepted.inc(accepted)
        if before is None:
            self._to_first.observe(job.last - job.began)
            self._prompt.inc(len(job.prompt))
            self._cached.inc(job.cached)
        else:
            self._between.observe((job.last - before) / count)

    def text(self) -> bytes:
        """The figures as Prometheus reads them."""
        return generate_latest(self._registry)
