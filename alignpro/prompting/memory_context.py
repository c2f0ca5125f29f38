"""What of a memory fits in the prompter's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, zip_longest

from alignpro.config import RewriteForm
from alignpro.data import Prompt
from alignpro.prompting.memory import Memory
from alignpro.prompting.memory_template import PastRewrite
from alignpro.prompting.rewrite_form import written_part

_CACHED = 4096
"""Inputs that are kept: a step encodes those of its prompts several times."""


class MemoryContext:
    """Puts a memory into the input of a prompter, as far as there is room.

    The memory lengthens an input by at most `MemoryConfig.max_tokens`, and never beyond ``max_input_tokens``: what fits without
    it still fits. Rewrites are taken in the order best, worst, second best, …; one that does not fit is left out.

    Args:
        memory: The past rewrites.
        max_input_tokens: Maximum length of the input.
        form: What the prompter writes of a rewrite, and so what is shown of one; one that is not of this form is shown whole.
    """

    def __init__(self, memory: Memory, max_input_tokens: int, form: RewriteForm = "whole") -> None:
        self.memory, self._max_input_tokens, self._form = memory, max_input_tokens, form
        self._version = memory.version
        self._known: dict[str, tuple[list[int], int]] = {}  # id of a prompt → its input, and how many rewrites it shows

    def encode(self, prompt: Prompt, request: str, encode: Callable[[str], list[int]]) -> list[int]:
        """The ids of the prompter's input.

        Args:
            prompt: The prompt.
            request: The text of its user turn, without the memory.
            encode: Text of the user turn → ids of the whole input.
        """
        if self._version != self.memory.version or len(self._known) >= _CACHED:
            self._version, self._known = self.memory.version, {}
        if (known := self._known.get(prompt.id)) is None:
            known = self._known[prompt.id] = self._encode(prompt, request, encode)
        return list(known[0])

    def shown(self, prompt: Prompt) -> int:
        """How many past rewrites are in the input that was encoded for a prompt; 0 if none was."""
        return self._known.get(prompt.id, ([], 0))[1]

    def _encode(self, prompt: Prompt, request: str, encode: Callable[[str], list[int]]) -> tuple[list[int], int]:
        plain = encode(request)
        limit = min(len(plain) + self.memory.config.max_tokens, self._max_input_tokens)
        recalled = self.memory.recall(prompt)
        best, worst = (list(map(self._shortened, part)) for part in (recalled.best, recalled.worst))
        ranked = [each for each in chain.from_iterable(zip_longest(best, worst)) if each is not None]

        def with_rewrites(chosen: Sequence[PastRewrite]) -> list[int]:
            parts = ([each for each in part if any(each is one for one in chosen)] for part in (best, worst))
            return encode(self.memory.template.render(request, *parts))

        if not ranked or len(plain) >= limit:
            return plain, 0
        if len(tokens := with_rewrites(ranked)) <= limit:
            return tokens, len(ranked)
        chosen: list[PastRewrite] = []
        tokens = plain
        for each in ranked:
            if len(longer := with_rewrites([*chosen, each])) <= limit:
                tokens = longer
                chosen.append(each)
        return tokens, len(chosen)

    def _shortened(self, each: PastRewrite) -> PastRewrite:
        written = written_part(self._form, each.prompt, each.rewrite)
        shown = each.rewrite if written is None else written
        return replace(each, prompt=self._cut(each.prompt), rewrite=self._cut(shown))

    def _cut(self, text: str) -> str:
        longest = self.memory.config.max_characters
        return text if len(text) <= longest else f"{text[:longest].rstrip()} …"
