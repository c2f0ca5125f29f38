"""How `alignpro serve` rewrites."""

from __future__ import annotations

from pydantic import Field

from alignpro.config.section import Section


class RewritingConfig(Section):
    """What is rewritten, and how long a request waits for it."""

    deadline_ms: float = Field(200.0, gt=0)
    """A rewrite that is not there by then is not used."""
    percent: float = Field(100.0, ge=0, le=100)
    """The share of users whose prompts are rewritten; the same users always."""
    shadow: bool = False
    """Rewrite and record, but send the original."""
