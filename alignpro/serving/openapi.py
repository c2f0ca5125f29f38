"""The OpenAPI document of the proxy's own routes. What the target makes of a request is its own affair, and described there."""

from __future__ import annotations

from typing import Any

import alignpro

_JSON = "application/json"


def _reply(what: str, schema: dict[str, Any] | None = None, kind: str = _JSON) -> dict[str, Any]:
    return {"description": what, "content": {kind: {"schema": schema or {"type": "object"}}}}


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_EXTENSION = {
    "type": "object",
    "description": "For the proxy alone: the target does not get it.",
    "additionalProperties": False,
    "properties": {
        "run": {"type": ["string", "null"], "description": "The run whose prompter rewrites."},
        "opt_out": {"type": "boolean", "description": "Send the prompt as it is."},
        "return": {"enum": ["body", "header", None], "description": "Where to give the rewrite back."},
    },
}
_COMMON = {
    "model": {"type": "string"},
    "stream": {"type": ["boolean", "null"]},
    "user": {"type": ["string", "null"]},
    "alignpro": _EXTENSION,
}
_MESSAGE = {
    "type": "object",
    "required": ["role"],
    "properties": {"role": {"type": "string"}, "content": {}},
}
_CHAT = {
    "type": "object",
    "required": ["messages"],
    "properties": {**_COMMON, "messages": {"type": "array", "minItems": 1, "items": _MESSAGE}},
}
_COMPLETION = {
    "type": "object",
    "properties": {**_COMMON, "prompt": {"type": ["string", "array"]}},
}
_REFUSED = {
    "400": "The body is not what the proxy or the target takes.",
    "401": "A token is missing or not valid.",
    "404": "The model or the run is not served.",
    "408": "The body did not come in time.",
    "413": "The body is too large.",
    "415": "The body's encoding is not known.",
    "429": "Too many requests at once: Retry-After says when to try again.",
    "502": "The target cannot be reached, or closed the connection.",
    "503": "The proxy stops.",
    "504": "The target did not answer in time.",
}
_OPT_OUT = {
    "name": "x-alignpro-opt-out",
    "in": "header",
    "schema": {"enum": ["0", "1"]},
    "description": "1 sends the prompt as it is.",
}


def _rewritable(summary: str, body: dict[str, Any]) -> dict[str, Any]:
    replies = {status: _reply(what, _ERROR) for status, what in _REFUSED.items()}
    answer = {
        "description": "The target's answer, with the target's status; a stream if the request asks for one.",
        "content": {_JSON: {"schema": {"type": "object"}}, "text/event-stream": {}},
    }
    return {
        "post": {
            "summary": summary,
            "security": [{}, {"token": []}],
            "parameters": [_OPT_OUT],
            "requestBody": {"required": True, "content": {_JSON: {"schema": body}}},
            "responses": {"200": answer, **replies, "default": _reply("The target's error.")},
        }
    }


def _get(summary: str, replies: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": replies}}


def openapi_document() -> dict[str, Any]:
    """The document, of OpenAPI 3.1."""
    ready = {
        "type": "object",
        "required": ["status", "problems", "runs"],
        "properties": {
            "status": {"enum": ["ready", "not ready"]},
            "problems": {"type": "array", "items": {"type": "string"}},
            "runs": {"type": "array", "items": {"type": "string"}},
        },
    }
    reloaded = {"type": "object", "properties": {"runs": {"type": "array", "items": {"type": "string"}}}}
    reload = {
        "summary": "Serve the runs and tokens of the configuration as it is now; only with tokens of administrators.",
        "security": [{"token": []}],
        "responses": {
            "200": _reply("The runs that are served.", reloaded),
            "401": _reply("A token is missing or not valid.", _ERROR),
            "404": _reply("The proxy has no tokens of administrators.", _ERROR),
            "409": _reply("Something cannot be loaded: nothing has changed.", _ERROR),
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Align-Pro",
            "version": alignpro.__version__,
            "description": "Rewrites prompts in front of an OpenAI-compatible target. Routes below /v1 that are not listed pass "
            "to the target as they are.",
        },
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "paths": {
            "/v1/chat/completions": _rewritable("A chat whose last user message may be rewritten.", _CHAT),
            "/v1/completions": _rewritable("A completion whose prompt may be rewritten.", _COMPLETION),
            "/v1/models": _get(
                "The target's models.",
                {"200": _reply("As the target lists them."), "default": _reply("The target's error.")},
            ),
            "/health": _get("The process answers.", {"200": _reply("It does.")}),
            "/ready": _get(
                "Whether requests can be served.",
                {"200": _reply("They can.", ready), "503": _reply("They cannot; problems says why.", ready)},
            ),
            "/metrics": _get(
                "Counts and times, for Prometheus.", {"200": _reply("They.", {"type": "string"}, "text/plain")}
            ),
            "/admin/reload": {"post": reload},
        },
    }
