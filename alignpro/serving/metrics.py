"""Counts and times of the proxy, in a registry of their own, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from alignpro.serving.exchange import Exchange

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
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
        for name, (what, read) in gauges.items():
            Gauge(name, what, registry=registry).set_function(read)

    def count(self, exchange: Exchange) -> None:
        """Count a request that has ended."""
        self._requests.labels(exchange.route, str(exchange.status)).inc()
        if exchange.status == 0:
            self._gone.inc()
        if exchange.error is not None:
            self._errors.labels(exchange.error).inc()
        if (outcome := exchange.outcome) is not None:
            if outcome.skipped is None:
                self._rewrites.labels(outcome.run or "").inc()
            else:
                self._skips.labels(outcome.skipped).inc()
        for phase, seconds in exchange.phases.items():
            self._seconds.labels(phase).observe(seconds)
        if exchange.first_byte is not None:
            self._seconds.labels("first_byte").observe(exchange.first_byte - exchange.began)
        self._seconds.labels("total").observe(time.perf_counter() - exchange.began)
        for kind, count in exchange.tokens.items():
            self._tokens.labels(kind).inc(count)
        self._bytes.labels("in").inc(exchange.bytes_in)
        self._bytes.labels("out").inc(exchange.bytes_out)

    def count_refused(self, reason: str) -> None:
        """Count a connection that never became a request."""
        self._refused.labels(reason).inc()

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self._registry)
