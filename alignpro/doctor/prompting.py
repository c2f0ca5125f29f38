"""The built-in meta-prompts."""

from __future__ import annotations

from collections.abc import Iterator

from alignpro.doctor.findings import Finding


def meta_prompts() -> Iterator[Finding]:
    """Their names and purposes."""
    from alignpro.prompting.meta_prompt import available_meta_prompts

    for name, description in available_meta_prompts().items():
        yield Finding("Meta-prompts", name, "ok", description)
