"""`alignpro serve`: what is served, to whom, and within which limits."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from alignpro.config.endpoints import require_http_url
from alignpro.config.section import OutputPath, Section
from alignpro.config.serving_page import PageConfig
from alignpro.config.serving_rewriting import RewritingConfig

_ADDRESS = re.compile(r"[\w.-]+:\d+(/|$)|\[[\da-f:]+\]:\d+(/|$)", re.IGNORECASE)
"""A host with a port, which no path or name of a model looks like."""


def _require_url_or_path(target: str) -> str:
    if "://" in target:
        return require_http_url(target)
    if _ADDRESS.match(target):
        raise ValueError(f"{target} is neither the URL of a server nor a model: did you mean http://{target}?")
    return target


def _require_header_name(name: str) -> str:
    allowed = "!#$%&'*+-.^_`|~"
    if not name or not all(char.isascii() and (char.isalnum() or char in allowed) for char in name):
        raise ValueError(f"{name!r} is no name of a header")
    return name.lower()


HeaderName = Annotated[str, AfterValidator(_require_header_name)]


class ListenConfig(Section):
    """Where the proxy listens."""

    host: str = "127.0.0.1"
    """An address of this machine; one that others can reach requires `access`."""
    port: int = Field(8000, ge=0, le=65535)
    """0 takes a free one, which the first line of the log names."""
    cors_origins: list[str] = Field(default_factory=list)
    """Origins whose pages may call the proxy from a browser, such as ``https://app.example.com``; by default none."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


class AccessConfig(Section):
    """Who may use the proxy."""

    tokens_env: str | None = None
    """The environment variable that holds the tokens of clients, separated by commas or white space."""
    tokens_file: Path | None = None
    """A file with a token in each line; empty lines and lines that begin with # are skipped. Read again at a reload."""
    admin_tokens_env: str | None = None
    """The environment variable that holds the tokens that may reload the runs over HTTP; by default nobody may."""
    anyone: bool = False
    """Serve others than this machine without tokens."""
    forward_authorization: bool = False
    """Send the client's own key to the target, instead of ours: for targets that each client pays for."""

    @model_validator(mode="after")
    def _check(self) -> AccessConfig:
        if self.forward_authorization and (self.tokens_env or self.tokens_file):
            raise ValueError(
                "forward_authorization: the header that holds the client's key for the target cannot hold a token too"
            )
        return self


class ServeLimitsConfig(Section):
    """How much is taken on at once, and how long anything may take. A request beyond them is refused, in OpenAI's form."""

    concurrent: int = Field(1024, ge=1)
    """Most requests that are with the prompter or the target at the same time."""
    queued: int = Field(256, ge=0)
    """Most requests that wait for a place; further ones get 429."""
    queue_seconds: float = Field(10.0, gt=0)
    """Longest wait for a place; then 429."""
    connections: int = Field(4096, ge=1)
    """Most connections of clients; further ones are closed at once."""
    body_bytes: int = Field(32 << 20, ge=1)
    """Largest body of a request, decompressed; larger ones get 413."""
    answer_bytes: int = Field(16 << 20, ge=1)
    """Largest answer into whose body a rewrite is put; with a larger one it is in the header."""
    header_seconds: float = Field(10.0, gt=0)
    """For the head of a request; then 408."""
    body_seconds: float = Field(60.0, gt=0)
    """For the body of a request; then 408."""
    keep_alive_seconds: int = Field(30, ge=1)
    """An idle connection of a client is closed after this."""
    connect_seconds: float = Field(10.0, gt=0)
    """For a connection to the target; then 504."""
    idle_seconds: float = Field(300.0, gt=0)
    """Longest time without a byte from the target, or in which the client takes none."""
    total_seconds: float = Field(3600.0, gt=0)
    """For a whole request."""
    drain_seconds: int = Field(60, ge=0)
    """After SIGTERM: how long requests in flight may take to end."""


class ServeLogConfig(Section):
    """The record of requests: a line of JSON each, on standard error or in a file."""

    requests: bool = True
    file: OutputPath | None = None
    """Appended to; opened anew at SIGHUP, for programs that rotate logs."""
    prompts: bool = False
    """Record the texts of prompts and rewrites too."""


class ServeConfig(Section):
    """`alignpro serve`."""

    runs: list[Path] = Field(default_factory=list)
    """Run directories whose prompters are served, the default first. Without any, requests are passed on as they are."""
    target: Annotated[str, AfterValidator(_require_url_or_path)] = Field(min_length=1)
    """The base URL of an OpenAI-compatible server, such as ``https://api.openai.com/v1``, or a model for this process."""
    model: str | None = None
    """The only model that clients may ask a server for; by default it decides."""
    api_key_env: str | None = None
    """The environment variable that holds the target's key."""
    extra_headers: dict[HeaderName, str] = Field(default_factory=dict)
    """Further headers of every request to the target; a value ``env:NAME`` is read from the environment."""
    forward_headers: list[HeaderName] = Field(default_factory=list)
    """Further headers of clients that the target gets."""
    return_headers: list[HeaderName] = Field(default_factory=list)
    """Further headers of the target that clients get."""
    ca_bundle: Path | None = None
    """A file of certificates to trust instead of the system's."""
    listen: ListenConfig = ListenConfig()
    access: AccessConfig = AccessConfig()
    limits: ServeLimitsConfig = ServeLimitsConfig()
    log: ServeLogConfig = ServeLogConfig()
    rewriting: RewritingConfig = RewritingConfig()
    page: PageConfig = PageConfig()

    @property
    def url(self) -> str | None:
        """The target's base URL; None if it is a model."""
        return self.target if "://" in self.target else None

    @model_validator(mode="after")
    def _check(self) -> ServeConfig:
        access = self.access
        if not self.listen.is_local and not (
            access.tokens_env or access.tokens_file or access.anyone or access.forward_authorization
        ):
            raise ValueError(
                f"listen.host {self.listen.host} can be reached from other machines: name tokens in access.tokens_env or "
                "access.tokens_file, or set access.anyone=true"
            )
        is_open = self.listen.is_local and not (access.tokens_env or access.tokens_file)
        if self.page.recent_requests and not is_open and not access.admin_tokens_env:
            raise ValueError(
                "page.recent_requests lists the requests of all clients: name tokens of those who may see it in "
                "access.admin_tokens_env"
            )
        if access.forward_authorization and self.api_key_env:
            raise ValueError(
                "api_key_env and access.forward_authorization both say whose key the target gets: give one"
            )
        if self.url is None and (self.api_key_env or self.extra_headers or self.ca_bundle):
            raise ValueError(
                f"target {self.target} is a model: api_key_env, extra_headers and ca_bundle are of servers"
            )
        if self.url is None and self.model is not None:
            raise ValueError(
                f"target {self.target} is a model: its name for clients is rewriting.target.name, not model"
            )
        if access.forward_authorization and self.rewriting.candidates is not None:
            raise ValueError(
                "rewriting.candidates asks the target on the proxy's own account, and access.forward_authorization leaves it "
                "no key: name one in api_key_env instead"
            )
        if access.forward_authorization and self.url is None:
            raise ValueError(
                f"target {self.target} is a model: it takes no client's key (access.forward_authorization)"
            )
        refused = {
            "host",
            "content-length",
            "transfer-encoding",
            "connection",
            "authorization",
            "cookie",
            "upgrade",
            "te",
        }
        for name in [*self.forward_headers, *self.return_headers]:
            if name in refused or name.startswith("proxy-"):
                raise ValueError(f"forward_headers, return_headers: {name} is not passed on")
        return self
