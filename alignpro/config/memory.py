"""The memory of past rewrites in the prompter's input."""

from __future__ import annotations

from pydantic import Field, model_validator

from alignpro.config.section import Section


class MemoryConfig(Section):
    """Which past rewrites the prompter sees before it rewrites a prompt."""

    size: int = Field(512, ge=1)
    """Most training prompts of which rewrites are kept; those that were not rewritten for longest are dropped first."""
    similar: int = Field(4, ge=1)
    """Number of most similar prompts whose rewrites are chosen from, by BM25."""
    best: int = Field(2, ge=0)
    """Most rewrites shown of those with the highest rewards."""
    worst: int = Field(1, ge=0)
    """Most rewrites shown of those with the lowest rewards."""
    max_tokens: int = Field(512, ge=1)
    """Most tokens by which the memory may lengthen the prompter's input, which never exceeds ``prompting.max_prompt_tokens``."""
    max_characters: int = Field(400, ge=1)
    """A prompt or rewrite of the memory is shown up to this length."""
    own: bool = False
    """Whether a prompt that is in the memory sees its own past rewrites, which no new prompt has."""
    template: str = "contrast"
    """How past rewrites are put before the prompter's instruction: a built-in template or a Jinja file."""

    @model_validator(mode="after")
    def _check_shown(self) -> MemoryConfig:
        if self.best + self.worst == 0:
            raise ValueError("best=0 and worst=0 show no rewrite: raise one of them, or leave `memory` out")
        return self
