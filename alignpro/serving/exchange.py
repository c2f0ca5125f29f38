"""What is known of one request and its answer, for headers, metrics and the log."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass, field

from alignpro.serving.contract import Api, Outcome
from alignpro.serving.headers import REQUEST_ID, Headers, first

_SAFE_ID = re.compile(rb"[!-~]{1,128}")


def new_request_id() -> str:
    """An id that no other request has."""
    return f"req_{random.getrandbits(128):032x}"


@dataclass
class Exchange:
    """A request and its answer. Times are of `time.perf_counter`, in seconds."""

    request_id: str
    method: str
    path: str
    began: float = field(default_factory=time.perf_counter)
    route: str = "other"
    """A word for metrics: few, whatever clients ask for."""
    api: Api | None = None
    """Of a route whose prompts can be rewritten."""
    model: str | None = None
    is_stream: bool = False
    user: str | None = None
    """A hash."""
    outcome: Outcome | None = None
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of queue, rewrite, and wait for the target's head."""
    status: int = 0
    """0 until the answer begins."""
    first_byte: float | None = None
    """When the first bytes of the body were sent."""
    bytes_in: int = 0
    bytes_out: int = 0
    tokens: dict[str, int] = field(default_factory=dict)
    """``prompt`` and ``completion``, as the target counts them."""
    error: str | None = None
    """The code of an error of the proxy's own, also in mid-stream."""
    detail: str | None = None
    """What the operator should know of it."""

    @classmethod
    def of(cls, method: str, path: str, headers: Headers) -> Exchange:
        """Begin one. The client's own request id is kept if it is printable ASCII of at most 128 characters."""
        given = first(headers, REQUEST_ID)
        request_id = given.decode("ascii") if given and _SAFE_ID.fullmatch(given) else new_request_id()
        return cls(request_id, method, path)

    def sent(self, count: int) -> None:
        """Note bytes of the body that are sent."""
        if self.first_byte is None:
            self.first_byte = time.perf_counter()
        self.bytes_out += count
