"""Methods of an experiment that train something else than a prompter of its own: the target's adapter, or a soft prompt."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from alignpro.config.method import MethodSection


class TargetAdapterMethod(MethodSection):
    """A prompter that is a LoRA on the target itself, whose weights are in memory once for both.

    Its ρ_sft is the target as it is, asked with the meta-prompt. It has no entry in ``prompters``, and counts for all of them.
    """

    kind: Literal["target_adapter"]
    label: str | None = None
    """Its name in the report; by default that of its key."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sections of `alignpro train` that differ from the experiment's ``train``, such as the ``rank`` of ``policy.adapter``."""


class SoftPromptMethod(MethodSection):
    """Trained embedding vectors in front of a model's prompt, all of whose weights stay as they are (Lester et al., 2021).

    ``before: prompter``: the policy is the prompter with these vectors. It writes rewrites, which are text, and its KL is to the
    prompter without them. ``before: target``: the policy is the target with them, which answers the unchanged prompt, and its
    KL is to the target without them. Such vectors are no text: no server can be given them.
    """

    kind: Literal["soft_prompt"]
    before: Literal["prompter", "target"] = "prompter"
    virtual_tokens: int = Field(20, ge=1)
    """Number of vectors."""
    init_text: str | None = None
    """The text whose embeddings they start from; by default random ones of the vocabulary."""
    label: str | None = None
    """Its name in the report; by default that of its key."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Sections of `alignpro train`, or before the target of `alignpro rlhf`, that differ from the experiment's."""

    @property
    def sections(self) -> dict[str, Any]:
        """What the method itself sets of a training."""
        vectors = {"kind": "soft_prompt", "virtual_tokens": self.virtual_tokens, "init_text": self.init_text}
        return {"policy": {"adapter": vectors}}
