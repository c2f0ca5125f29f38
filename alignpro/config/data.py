"""The source of prompts and their formatting for the models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignpro.config.section import Section, default_of


class DataConfig(Section):
    """The source of prompts: a preset by name, or local files with a column mapping."""

    source: str | Annotated[list[str], Field(min_length=1)]
    """A preset (``ultrafeedback``, ``helpsteer``, ``orca``, ``hh-rlhf``, ``bpo``), or paths of local files (.json, .jsonl,
    .csv, .parquet, optionally gzipped)."""
    split: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    """Field of `Prompt` -> column; dotted paths address nested values (``conversations.0.value``)."""
    holdout: float = Field(0.1, ge=0, lt=1)
    """Share of prompts held out for evaluation, selected by a hash of the content."""
    validation: float = Field(0.0, ge=0, lt=1)
    """Share of prompts on which a run evaluates itself, beside those held out: `alignpro eval` reports none of them, so that
    ``run.select: best`` may choose by them. Without it, a run evaluates itself on held-out prompts."""
    holdout_by: Literal["first_turn", "conversation"] = "first_turn"
    """What is hashed. ``conversation`` is the way of earlier versions: resumed runs and the evaluation of their models keep
    what their run directory records."""
    cluster: str | None = None
    """For the intervals of `alignpro eval`: a key of the metadata, such as a template; prompts with equal values are one
    cluster. ``source`` is the prompt's file or data set if it is no such key."""
    limit: int | None = Field(None, ge=1)
    max_bad_rows: int = Field(100, ge=0)

    @field_validator("columns", mode="before")
    @classmethod
    def _flatten_metadata(cls, columns: Any) -> Any:
        """Take ``metadata: {KEY: COLUMN}``, which an override of ``metadata.KEY`` becomes, as ``metadata.KEY``."""
        if not isinstance(columns, Mapping) or not isinstance(metadata := columns.get("metadata"), Mapping):
            return columns
        rest = {field: column for field, column in columns.items() if field != "metadata"}
        return {**rest, **_by_path("metadata", metadata)}

    @model_validator(mode="after")
    def _check_shares(self) -> DataConfig:
        if self.holdout + self.validation >= 1:
            raise ValueError(f"holdout={self.holdout} and validation={self.validation} leave no prompts to train on")
        return self


def _by_path(path: str, value: Any) -> dict[str, Any]:
    """The values of nested mappings by the dotted paths of their keys."""
    if not isinstance(value, Mapping):
        return {path: value}
    return {key: each for name, below in value.items() for key, each in _by_path(f"{path}.{name}", below).items()}


class SFTDataConfig(DataConfig):
    """The source of pairs for supervised fine-tuning: their own, or prompts that a bank of moves rewrites."""

    moves: str | None = None
    """``default`` or a YAML file of rewriting moves: the prompts are rewritten by moves that are drawn uniformly. Pairs of
    the file's own are kept beside them."""
    moves_per_prompt: int = Field(4, ge=1)
    """Pairs that are made of each prompt, by different moves."""
    copies: float = Field(0.1, ge=0, le=1)
    """Share of these pairs whose rewrite is the prompt itself."""
    joined: float = Field(0.0, ge=0, le=1)
    """Share of the other ones whose rewrite makes two different moves, one after the other."""

    @model_validator(mode="after")
    def _check_moves(self) -> Self:
        own = ("moves_per_prompt", "copies", "joined")
        if self.moves is None and (given := [key for key in own if getattr(self, key) != default_of(self, key)]):
            raise ValueError(f"{', '.join(given)} without `moves`, of which pairs would be made: name a bank of moves")
        return self


RewriteForm = Literal["whole", "addition"]
"""What the prompter writes of a rewrite."""


class PromptingConfig(Section):
    """How the prompter's input is built from x, and the target's from x'."""

    form: RewriteForm = "whole"
    """What the prompter writes: the ``whole`` rewrite, or an ``addition`` that follows the prompt after a blank line."""
    meta_prompt: str = "none"
    """A built-in (`alignpro doctor` lists them) or a Jinja file."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Maximum length of the prompter's input; longer prompts are dropped and counted when data are loaded."""
    on_empty: Literal["send", "original"] = "send"
    """Whether an empty rewrite is sent to the target as an empty user message, or replaced by the original prompt."""
    truncation_penalty: float = Field(0.0, ge=0)
    """Subtracted from the reward of a rewrite that reached its token limit without an end token."""

    @model_validator(mode="after")
    def _asks_for_the_form(self) -> Self:
        form = _FORM_ASKED_FOR.get(self.meta_prompt, self.form)
        if form != self.form:
            raise ValueError(
                f"meta_prompt={self.meta_prompt} asks for {_ASKED[form]}, but form={self.form} takes what the prompter writes as "
                f"{_ASKED[self.form]}: set form={form}, or another meta_prompt"
            )
        return self


_ASKED: Mapping[RewriteForm, str] = {"whole": "the whole rewrite", "addition": "an addition to the prompt"}
_FORM_ASKED_FOR: Mapping[str, RewriteForm] = {
    **dict.fromkeys(("rewrite", "clarify", "expand", "structure"), "whole"),
    "addition": "addition",
}
"""Of the built-in meta-prompts; ``none`` asks for nothing."""
