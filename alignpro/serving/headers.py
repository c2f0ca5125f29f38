"""Which headers pass, in either direction, and the proxy's own.

Both directions are lists of what is allowed: what is not named stays here. The client's ``authorization`` is never among them,
unless the operator wants it; the target's key takes its place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from hashlib import sha256
from urllib.parse import quote

from alignpro.serving.contract import Outcome

Headers = list[tuple[bytes, bytes]]

TO_TARGET = frozenset(
    b"accept accept-encoding accept-language content-type user-agent openai-beta idempotency-key traceparent tracestate "
    b"http-referer x-title".split()
)
"""What a client may tell the target; besides these, all that begin with ``x-stainless-``: the official clients' own."""

OF_CLIENTS_KEY = frozenset({b"authorization", b"openai-organization", b"openai-project"})
"""Passed only with the client's own key: whose account it is."""

TO_CLIENT = frozenset(
    b"content-type content-language content-disposition retry-after retry-after-ms x-should-retry openai-model "
    b"openai-processing-ms openai-version cache-control www-authenticate".split()
)
"""What the target may tell a client; besides these, all that begin with ``x-ratelimit-``."""

REQUEST_ID = b"x-request-id"
UPSTREAM_REQUEST_ID = b"x-upstream-request-id"
OPT_OUT = b"x-alignpro-opt-out"
RUN = b"x-alignpro-run"
REWRITTEN = b"x-alignpro-rewritten"
"""Holds the rewrite, percent-encoded as UTF-8, if it was asked for."""
LONGEST_REWRITTEN = 16_000
"""Bytes of that header: clients refuse heads that are much longer."""


def first(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header, whose name is given in lower case."""
    return next((value for key, value in headers if key == name), None)


def to_target(headers: Iterable[tuple[bytes, bytes]], allowed: Collection[bytes]) -> Headers:
    """Those of a client's headers that the target gets."""
    return [each for each in headers if each[0] in allowed or each[0].startswith(b"x-stainless-")]


def to_client(headers: Iterable[tuple[bytes, bytes]], allowed: Collection[bytes], *, same_body: bool) -> Headers:
    """Those of the target's headers that a client gets.

    Args:
        headers: The target's.
        allowed: Names in lower case.
        same_body: Whether the body passes as it is: then its length and encoding hold too.
    """
    kept: Headers = []
    for name, value in headers:
        name = name.lower()
        if name in allowed or name.startswith(b"x-ratelimit-"):
            kept.append((name, value))
        elif name == REQUEST_ID:
            kept.append((UPSTREAM_REQUEST_ID, value))
        elif same_body and name in (b"content-length", b"content-encoding"):
            kept.append((name, value))
    return kept


def of_outcome(outcome: Outcome) -> Headers:
    """What became of the prompt."""
    state = "applied" if outcome.skipped is None else f"skipped:{outcome.skipped}"
    told = [(b"x-alignpro-rewrite", state.encode()), (b"x-alignpro-ms", b"%.1f" % (1000 * outcome.seconds))]
    if outcome.run is not None:
        told.append((RUN, quote(outcome.run, safe="").encode()))
    if outcome.skipped is None and outcome.rewrite is not None:
        told.append((b"x-alignpro-rewrite-hash", rewrite_hash(outcome.rewrite).encode()))
    return told


def rewrite_hash(rewrite: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a rewrite."""
    return sha256(rewrite.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def rewritten(rewrite: str) -> Headers:
    """The rewrite itself, unless it is too long for a header."""
    value = quote(rewrite, safe="", errors="replace").encode()
    return [(REWRITTEN, value)] if len(value) <= LONGEST_REWRITTEN else []
