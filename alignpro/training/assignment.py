"""Which of a step's prompts this process takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks


class PromptAssignment:
    """Assigns prompts to ranks so that all compute nearly the same number of tokens.

    Args:
        ranks: All ranks.
        encode: The policy's input for a prompt.
        max_tokens: Maximum length of a sample.
    """

    def __init__(self, ranks: Ranks, encode: Callable[[Prompt], Sequence[int]], max_tokens: int) -> None:
        self._ranks, self._encode = ranks, encode
        self.expected_length = float(max_tokens)
        """Expected tokens per sample: the mean of the last step, or the maximum before the first step."""

    def __call__(
        self, prompts: Sequence[Prompt], samples: int, expected_length: float | None = None
    ) -> tuple[list[int], list[Prompt]]:
        """Return the indices of this rank's prompts, ascending, and these prompts.

        Args:
            prompts: All prompts of the step.
            samples: Samples per prompt.
            expected_length: Expected tokens per sample, where it is not that of now.
        """
        local = list(range(len(prompts)))
        if self._ranks.size > 1:
            sampled = samples * (self.expected_length if expected_length is None else expected_length)
            local = self._ranks.assign_balanced([len(self._encode(prompt)) + sampled for prompt in prompts])
        return local, [prompts[i] for i in local]
