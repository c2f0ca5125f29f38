"""Counts and times of the proxy, in a registry of their own, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from alignpro.serving.contract import Outcome
from alignpro.serving.exchange import Exchange

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
MetricT = TypeVar("MetricT", Counter, Histogram)
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """What `/metrics` shows.

    Args:
        gauges: Name → what it is and how it is read when the metrics are.
    """

    def __init__(self, gauges: dict[str, tuple[str, Callable[[], float]]]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "alignpro_requests", "Requests that have ended.", ["route", "status"], registry=registry
        )
        self._errors = Counter("alignpro_errors", "Errors of the proxy's own.", ["code"], registry=registry)
        self._rewrites = Counter("alignpro_rewrites", "Prompts that were rewritten.", ["run"], registry=registry)
        self._skips = Counter("alignpro_skips", "Prompts that went as they came.", ["reason"], registry=registry)
        self._unused = Counter(
            "alignpro_unused_rewrites", "What became of prompts in shadow mode.", ["result"], registry=registry
        )
        self._seconds = Histogram(
            "alignpro_phase_seconds",
            "Seconds of a request: in the queue, at the prompter, until the target's head, until the first byte, in all.",
            ["phase"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._tokens = Counter("alignpro_tokens", "As the target counts them.", ["kind"], registry=registry)
        self._bytes = Counter("alignpro_bytes", "Of bodies.", ["direction"], registry=registry)
        self._gone = Counter("alignpro_disconnects", "Clients that left before the end.", registry=registry)
        self._refused = Counter(
            "alignpro_refused_connections", "Connections that ended before a request.", ["reason"], registry=registry
        )
        self._children: dict[tuple[Counter | Histogram, tuple[str, ...]], Counter | Histogram] = {}
        for name, (what, read) in gauges.items():
            Gauge(name, what, registry=registry).set_function(read)

    def _of(self, metric: MetricT, *labels: str) -> MetricT:
        """A metric with these labels; the library takes a while to find it."""
        child = self._children.get((metric, labels))
        if child is None:
            child = self._children[metric, labels] = metric.labels(*labels)
        return cast(MetricT, child)

    def count(self, exchange: Exchange) -> None:
        """Count a request that has ended."""
        self._of(self._requests, exchange.route, str(exchange.status)).inc()
        if exchange.status == 0:
            self._gone.inc()
        if exchange.error is not None:
            self._errors.labels(exchange.error).inc()
        if (outcome := exchange.outcome) is not None:
            if outcome.skipped is None:
                self._of(self._rewrites, outcome.run or "").inc()
            else:
                self._of(self._skips, outcome.skipped).inc()
        for phase, seconds in exchange.phases.items():
            self._of(self._seconds, phase).observe(seconds)
        if exchange.first_byte is not None:
            self._of(self._seconds, "first_byte").observe(exchange.first_byte - exchange.began)
        self._of(self._seconds, "total").observe(time.perf_counter() - exchange.began)
        for kind, count in exchange.tokens.items():
            self._of(self._tokens, kind).inc(count)
        self._of(self._bytes, "in").inc(exchange.bytes_in)
        self._of(self._bytes, "out").inc(exchange.bytes_out)

    def count_later(self, outcome: Outcome) -> None:
        """Count a rewrite that was not waited for."""
        self._of(self._unused, outcome.skipped or "rewritten").inc()

    def count_refused(self, reason: str) -> None:
        """Count a connection that never became a request."""
        self._refused.labels(reason).inc()

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self._registry)
