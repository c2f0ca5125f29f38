"""The memory of past rewrites in a comparison: which one the prompters see, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from alignpro.config import ModelConfig
from alignpro.data import Prompt
from alignpro.prompting.memory import Memory, read_memory

logger = logging.getLogger(__name__)


def shown_memory(*prompters: ModelConfig | None) -> Memory | None:
    """The memory of the first prompter that has one: all prompters of the comparison see it; None if none has.

    Raises:
        ModelError: A memory cannot be read.
    """
    for each in prompters:
        if each is not None and (memory := read_memory(each.path)) is not None:
            logger.info("prompters see %d past rewrites of %s", len(memory.rewrites), each.path)
            return memory
    return None


def memory_notes(memory: Memory | None, prompts: Sequence[Prompt]) -> list[str]:
    """What a comparison says of the memory.

    Args:
        memory: What the prompters see; None if they see nothing.
        prompts: On which they are compared.
    """
    if memory is None:
        return []
    notes = [
        f"All prompters see a memory of {len(memory.rewrites)} past rewrites of {len(memory)} training prompts (template "
        f"{memory.template.version}), the prompter before training included: KL is between them in the same context."
    ]
    if inside := sum(map(memory.holds, prompts)):
        notes.append(
            f"{inside} of the {len(prompts)} prompts are in the memory, so they were trained on: this is no held-out reward."
        )
    return notes
