"""Chooses one of several rewrites by the reward of the target's responses to them.

The reward is that of the run, r*(x, y): what it was trained for is maximised once more, at the price of the responses.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from alignpro.config.serving_rewriting import CandidatesConfig
from alignpro.data import Prompt
from alignpro.engine import derive_seed
from alignpro.errors import RewardError
from alignpro.objectives import gibbs_resample
from alignpro.rewards import RewardStack
from alignpro.serving.contract import Asked, ServedTarget, TargetFailure, TargetRequest
from alignpro.serving.prompt_span import Conversation, replaced

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
_OF_STREAMS = ("stream", "stream_options")


@dataclass(frozen=True)
class Choice:
    """The chosen rewrite."""

    index: int
    reward: float
    """The mean reward of its responses."""


class CandidateChooser:
    """Asks the target for responses to each rewrite, and chooses by their rewards.

    Args:
        config: How many responses, and how the choice is made.
        reward: The reward of the run.
        target: What answers.
        seed: Of the draw of ``gibbs``, with the prompt.
    """

    def __init__(self, config: CandidatesConfig, reward: RewardStack, target: ServedTarget, seed: int) -> None:
        self._config, self._reward, self._target, self._seed = config, reward, target, seed

    async def choose(self, asked: Asked, conversation: Conversation, rewrites: Sequence[str]) -> Choice:
        """Choose a rewrite of the last turn of a conversation.

        Raises:
            RewardError: The target does not answer, or the reward fails.
        """
        prompt = conversation.prompt
        assert prompt is not None  # there are rewrites of it
        responses = await asyncio.gather(*(self._answers(asked, conversation, rewrite) for rewrite in rewrites))
        rewards = await asyncio.to_thread(self._rewards, prompt, rewrites, responses)  # (N,)
        if self._config.choose == "best":
            index = int(rewards.argmax())
        else:
            weights = gibbs_resample(rewards, self._config.kl_coef).weights
            generator = torch.Generator().manual_seed(derive_seed(self._seed, "gibbs", prompt.id))
            index = int(torch.multinomial(weights, 1, generator=generator))
        return Choice(index, float(rewards[index]))

    def _rewards(self, prompt: Prompt, rewrites: Sequence[str], responses: Sequence[Sequence[str]]) -> torch.Tensor:
        """The mean rewards of the responses to each rewrite, (N,) float64."""
        pairs = [(rewrite, y) for rewrite, own in zip(rewrites, responses, strict=True) for y in own]
        scored = self._reward([prompt] * len(pairs), [y for _, y in pairs], [rewrite for rewrite, _ in pairs])
        return torch.tensor(scored.values, dtype=torch.float64).view(len(rewrites), -1).mean(1)

    async def _answers(self, asked: Asked, conversation: Conversation, rewrite: str) -> list[str]:
        """The target's M responses to a rewrite, sampled as the client asked."""
        assert conversation.last is not None
        body = json.loads(replaced(asked.raw, asked.api, [(conversation.last, rewrite)]))
        body = {name: value for name, value in body.items() if name not in _OF_STREAMS}
        body["n"] = self._config.responses
        request = TargetRequest(
            "POST", PATHS[asked.api], ((b"content-type", b"application/json"),), json.dumps(body).encode()
        )
        try:
            response = await self._target.send(request)
            try:
                content = b"".join([chunk async for chunk in response.chunks()])
            finally:
                await response.close()
        except TargetFailure as error:
            raise RewardError(f"candidates: the target does not answer: {error}") from error
        texts = _texts(content) if response.status == 200 else []
        if len(texts) != self._config.responses:
            raise RewardError(
                f"candidates: the target answered {response.status} with {len(texts)} texts, {self._config.responses} were "
                f"asked for: {content[:200]!r}"
            )
        return texts


def _texts(content: bytes) -> list[str]:
    """The texts of an answer."""
    try:
        choices: Any = json.loads(content)["choices"]
        found = [choice["message"]["content"] if "message" in choice else choice["text"] for choice in choices]
    except (ValueError, KeyError, TypeError):
        return []
    return [text.strip() for text in found if isinstance(text, str)]
