"""Servers that answer over HTTP: where they are, how fast they may be asked, what they may cost."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from alignpro.config.section import Section


def require_http_url(url: str) -> str:
    """Check that a URL is one of HTTP that holds no key; returns it without a slash at its end."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected http://HOST/… or https://HOST/…")
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user name or password: name the variable that holds the key in api_key_env")
    if parts.query or parts.fragment:
        raise ValueError("holds a query: give it in extra_query")
    return url.rstrip("/")


def _require_no_password(proxy: str) -> str:
    if not proxy.startswith("env:") and urlsplit(proxy).password is not None:
        raise ValueError("holds a password: put the proxy into the environment and give env:NAME")
    return proxy


ProxyURL = Annotated[str, AfterValidator(_require_no_password)]
"""A proxy without its password; ``env:NAME`` is read from the environment."""


def _require_free_fields(body: dict[str, Any]) -> dict[str, Any]:
    for name in ("n", "seed", "stream", "messages", "prompt"):
        if name in body:
            raise ValueError(f"{name!r} cannot be given here: it follows from what is asked")
    return body


class EndpointConfig(Section):
    """A model behind an OpenAI-compatible server."""

    base_url: Annotated[str, AfterValidator(require_http_url)]
    """What comes before ``/chat/completions`` or ``/completions``, such as ``https://api.openai.com/v1``."""
    model: str = Field(min_length=1)
    api: Literal["chat", "completions"] = "chat"
    """``chat`` sends the conversation; ``completions`` sends its last turn as plain text."""
    api_key_env: str | None = None
    """The environment variable that holds the key, which is read from nowhere else and written nowhere."""
    extra_headers: dict[str, str] = Field(default_factory=dict)
    """Further headers; a value ``env:NAME`` is read from the environment, as keys must be."""
    extra_query: dict[str, str] = Field(default_factory=dict)
    extra_body: Annotated[dict[str, Any], AfterValidator(_require_free_fields)] = Field(default_factory=dict)
    """Further fields of every request, such as ``{"reasoning_effort": "low"}``. A field that is null is not sent, and
    ``max_completion_tokens`` takes the place of ``max_tokens``."""
    ca_bundle: Path | None = None
    """A file of certificates to trust instead of the system's."""
    proxy: ProxyURL | None = None
    """Of all requests; ``env:NAME`` is read from the environment."""
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    max_concurrency: int = Field(64, ge=1)
    """Most requests at the same time; how many are allowed below that follows from the server's answers."""
    timeout_seconds: float = Field(300.0, gt=0)
    """For a whole answer."""
    max_retries: int = Field(8, ge=0)
    """How often a request is repeated after a failure that may pass."""
    max_failures: int = Field(32, ge=1)
    """Consecutive failures, of any requests, that end the run; those that were in flight together count once."""
    max_answer_bytes: int = Field(1 << 22, ge=1)
    prompt_overhead: int = Field(512, ge=0)
    """Most tokens that the server adds to a prompt: special tokens, a system message of its own. What a request may cost is
    reserved with them."""
    n: bool | None = None
    """Whether the server answers one request with ``n`` draws; by default it is asked once."""
    seed: bool | None = None
    """Whether each draw's seed is sent; by default, if the server accepts it."""
    seed_bits: int = Field(63, ge=1, le=63)
    """The seed is sent modulo 2^seed_bits: some servers take no more than 31 or 32 bits."""

    @property
    def variables(self) -> list[str]:
        """The environment variables whose values are sent."""
        values = [*self.extra_headers.values(), self.proxy or ""]
        named = [value.removeprefix("env:") for value in values if value.startswith("env:")]
        return [*([self.api_key_env] if self.api_key_env else []), *named]


class TargetEndpointConfig(EndpointConfig):
    """A frozen target behind a server."""

    system: str | None = None
    """A system message, for prompts without one."""
    wrapper: str | None = None
    """A Jinja template around x', with the variable ``rewrite``, for applications that embed the user's text in a prompt of
    their own. It is the only template: answers never are."""
    filtered_reward: float | None = None
    """The value of a rewrite whose answer the server's content filter refused; without it such an answer ends the run."""
    overflow_reward: float | None = None
    """The value of a rewrite that does not fit in the server's context; without it such a rewrite ends the run."""

    @model_validator(mode="after")
    def _check_system(self) -> TargetEndpointConfig:
        if self.system is not None and self.api == "completions":
            raise ValueError("`system` needs api=chat: completions get one text; put it into `wrapper`")
        return self


class PriceConfig(Section):
    """What a model costs, in US dollars."""

    input: Decimal = Field(ge=0, le=1_000_000)
    """For a million tokens of prompts."""
    output: Decimal = Field(ge=0, le=1_000_000)
    """For a million tokens of answers, reasoning included."""
    request: Decimal = Field(Decimal(0), ge=0, le=1_000_000)
    """For each request."""


class BudgetConfig(Section):
    """Limits of what a run may spend, all answers of earlier parts of the run included; the last request is not sent."""

    usd: Decimal | None = Field(None, ge=0)
    requests: int | None = Field(None, ge=0)
    tokens: int | None = Field(None, ge=0)


class SpendingConfig(Section):
    """What is spent on servers, and where it is recorded."""

    budget: BudgetConfig = BudgetConfig()
    prices: dict[str, PriceConfig] = Field(default_factory=dict)
    """Model → what it costs. A limit in dollars needs the price of every model that is asked."""
    ledger: Path | None = None
    """The file of all requests and answers; by default ``ledger.sqlite`` in the run directory. Runs may share one, one after
    another: what was answered is not bought again."""

    @model_validator(mode="after")
    def _check_prices(self) -> SpendingConfig:
        if self.budget.usd is not None and not self.prices:
            raise ValueError("budget.usd needs `prices`: an unknown price is not 0")
        return self


HOW_SERVERS_ARE_ASKED = (
    "api_key_env",
    "ca_bundle",
    "proxy",
    "requests_per_minute",
    "tokens_per_minute",
    "max_concurrency",
    "timeout_seconds",
    "max_retries",
    "max_failures",
    "max_answer_bytes",
    "prompt_overhead",
)
"""Keys of an `EndpointConfig` on which no answer depends."""
SPENDING = tuple(SpendingConfig.model_fields)
"""Keys of a job on which no answer depends, either."""


def changes_no_answer(key: str) -> bool:
    """Whether no answer depends on a dotted key of a job's configuration: what may be spent, and how servers are asked.

    Those of a reward count: what was scored is compared by its whole configuration.
    """
    section, _, name = key.partition(".")
    if section in SPENDING:
        return True
    return section in ("target", "search") and "endpoint." in name and name.rpartition(".")[2] in HOW_SERVERS_ARE_ASKED
