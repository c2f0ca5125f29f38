"""The page of `alignpro serve`."""

from __future__ import annotations

from pydantic import Field

from alignpro.config.section import Section


class PageConfig(Section):
    """The page at ``/``, on which prompts are tried."""

    enabled: bool = True
    recent_requests: int = Field(0, ge=0, le=10_000)
    """How many of the last requests it lists, those of all clients; they are kept in memory alone. 0 keeps none."""
    recent_texts: bool = False
    """Keep their prompts and rewrites too, up to 2,000 characters of each."""
    rewards: bool = False
    """Score the answers by the reward of the run, if that is made of functions; their code runs in the proxy."""
