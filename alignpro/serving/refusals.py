"""Answers of the proxy's own that are errors, in the form in which OpenAI's API gives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from http import HTTPStatus

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refusal(Exception):  # noqa: N818
    """A request that ends with an error of the proxy.

    Args:
        status: Of HTTP.
        message: For the client; it names no secret and no prompt.
        code: A word for programs.
        param: The field of the body that is wrong.
        headers: Further headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> bytes:
        """The error as a JSON document in UTF-8."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def refusal_of_status(status: int) -> Refusal:
    """The refusal for a status that a library chose, such as 404 for an unknown path."""
    phrase = HTTPStatus(status).phrase
    where = "the API is below /v1, and /openapi.json lists what is served" if status == 404 else "see /openapi.json"
    return Refusal(status, f"{phrase}: {where}.", phrase.lower().replace(" ", "_"))
