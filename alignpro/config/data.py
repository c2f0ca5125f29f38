"""Where prompts come from, and what becomes of them before a model reads them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignpro.config.section import Section


class DataConfig(Section):
    """Where prompts come from: a preset by name, or local files with a column mapping."""

    source: str | list[str]
    """A preset (``ultrafeedback``, ``helpsteer``, ``orca``, ``hh-rlhf``, ``bpo``), or paths of local files: .json, .jsonl,
    .csv, .parquet, also gzipped."""
    split: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    """Field of `Prompt` -> column; dots reach into nested fields (``conversations.0.value``)."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of prompts held out for evaluation, decided by a hash of the content."""
    limit: int | None = Field(None, ge=1)
    max_bad_rows: int = Field(100, ge=0)


class PromptingConfig(Section):
    """How x becomes the prompter's input and x' the target's."""

    meta_prompt: str = "none"
    """A built-in (`alignpro doctor` lists them) or a Jinja file."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Prompter input longer than this is an error for that prompt at data load, which is dropped and counted."""
    on_empty: Literal["send", "original"] = "send"
    """An empty rewrite is sent as it is (the target sees an empty user message), or replaced by the original prompt."""
    truncation_penalty: float = Field(0.0, ge=0)
    """Subtracted from the reward of a rewrite that reached its token limit without an end token."""
