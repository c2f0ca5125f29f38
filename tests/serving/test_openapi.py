"""The proxy's description of its routes is that of the routes it has."""

from __future__ import annotations

from typing import Any

import pytest
from proxies import CHAT, Proxy, proxied
from upstream import Upstream


def test_every_route_that_is_described_is_there(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMINS", "root")
    with proxied(upstream.url, access={"admin_tokens_env": "ADMINS"}) as proxy:
        document = proxy.ask(path="/openapi.json", method="GET").json()
        assert document["openapi"] == "3.1.0"
        for path, methods in document["paths"].items():
            for method, operation in methods.items():
                reply = proxy.ask(CHAT if method == "post" else None, path=path, method=method.upper())
                described = operation["responses"].get(str(reply.status), operation["responses"].get("default"))
                kind = reply.headers["content-type"].split(";")[0]
                assert described is not None, (path, reply.status)
                assert kind in described["content"], path
                assert reply.status != 404, path


def test_errors_have_the_form_that_is_described(proxy: Proxy) -> None:
    document: Any = proxy.ask(path="/openapi.json", method="GET").json()
    operation = document["paths"]["/v1/chat/completions"]["post"]
    schema = operation["responses"]["400"]["content"]["application/json"]["schema"]
    error = proxy.ask(b"{").json()["error"]
    assert set(schema["properties"]["error"]["required"]) == set(error)
