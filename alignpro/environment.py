"""Environments: how a policy's samples are used and scored.

`PromptEnvironment` is the project's own: the sample is a rewrite x', a frozen target responds to it, and the reward
scores the response against the ORIGINAL prompt. `ResponseEnvironment` is RLHF: the sample is the response. One trainer
serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from alignpro.chat_template import ChatTemplate
from alignpro.config import PromptingConfig, SamplingConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, Completion, Engine, SamplingParams
from alignpro.errors import TrainingError
from alignpro.prompting import PrompterTemplate, TargetInput, TargetTemplate
from alignpro.rewards import RewardStack


@dataclass
class Scores:
    """The rewards of P prompts × K samples × M responses."""

    values: Tensor
    """(P, K) float32: R(x, x'), the mean over the M responses, minus the penalty if the sample is truncated."""
    rewards: Tensor
    """(P, K, M) float32: r*(x, y), with component weights and guard penalties applied."""
    samples: list[list[str]]
    """[P][K]: the policy's samples, as text."""
    responses: list[list[list[str]]]
    """[P][K][M]: the responses that were scored, as text."""
    metrics: dict[str, float]
    """Means of the reward's components, of the guards, and of flags of the samples such as truncation."""


class Environment(Protocol):
    """Turns prompts into scored samples."""

    def encode(self, prompt: Prompt) -> list[int]:
        """The policy's input for this prompt."""

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        """Sample ``params.n`` chains per prompt."""

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> Scores:
        """Score the chains."""


class PromptEnvironment:
    """A frozen target responds to each rewrite, and the reward scores its responses.

    Args:
        prompter: Template of the prompter: prompt → tokens, tokens → rewrite.
        target: Template of the target: prompt with its last turn rewritten → tokens, tokens → response.
        reward: r*(x, y), with its guards on (x, x').
        respond: How the target samples its M responses (``n``) per rewrite.
        config: How empty and truncated rewrites are treated.
    """

    def __init__(
        self,
        prompter: PrompterTemplate,
        target: TargetTemplate,
        reward: RewardStack,
        respond: SamplingParams,
        config: PromptingConfig,
    ) -> None:
        self.prompter = prompter
        self.target = target
        self.reward = reward
        self.respond = replace(respond, stop_token_ids=target.stop_token_ids)
        self.config = config

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompter's input: meta-prompt and template around x."""
        return self.prompter.encode(prompt)

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        """Sample x → K rewrites → M responses to each."""

        inputs: dict[int, TargetInput] = {}  # keyed by the id of the sample

        def to_target(i: int, sample: Completion) -> list[int]:
            given = self.target.encode(prompts[i], self.prompter.decode(sample.text_tokens))
            inputs[id(sample)] = given
            return given.tokens

        encoded = [self.encode(prompt) for prompt in prompts]
        params = replace(params, stop_token_ids=self.prompter.stop_token_ids)
        chains = engine.run_chains(encoded, rewrite=params, to_target=to_target, respond=self.respond, seeds=seeds)
        for chain in (chain for group in chains for chain in group if id(chain.sample) in inputs):
            given = inputs[id(chain.sample)]
            chain.notes = {"rewrite/empty": float(given.empty), "rewrite/over_long": float(given.dropped > 0)}
        return chains

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> Scores:
        """Average the rewards of the responses to each rewrite, scored against the original prompt."""
        _refuse_errors(prompts, chains)
        rewrites = [[self.prompter.decode(c.sample.text_tokens) for c in group] for group in chains]
        responses = [[[self.target.decode(y.text_tokens) for y in c.responses] for c in group] for group in chains]
        scores = score_texts(
            prompts,
            rewrites,
            responses,
            self.reward,
            truncated=_truncated(chains),
            truncation_penalty=self.config.truncation_penalty,
        )
        return replace(scores, metrics=scores.metrics | _mean_notes(chains))


class ResponseEnvironment:
    """The sample is the response itself: RLHF of the target, and its evaluation.

    Args:
        template: Template of the policy: prompt → tokens, tokens → response.
        reward: r*(x, y); its guards compare rewrites and are not applied here.
    """

    def __init__(self, template: ChatTemplate, reward: RewardStack) -> None:
        self.template = template
        self.reward = reward

    def encode(self, prompt: Prompt) -> list[int]:
        """The policy's input: the template around the conversation."""
        return self.template.encode(prompt.messages)

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        """Sample x → K responses."""
        params = replace(params, stop_token_ids=self.template.stop_token_ids)
        groups = engine.generate("policy", [self.encode(prompt) for prompt in prompts], params, seeds)
        return [[Chain(sample) for sample in group] for group in groups]

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> Scores:
        """Score each response."""
        _refuse_errors(prompts, chains)
        texts = [[self.template.decode(c.sample.text_tokens) for c in group] for group in chains]
        responses = [[[text] for text in group] for group in texts]
        scores = score_texts(prompts, None, responses, self.reward, truncated=_truncated(chains))
        return replace(scores, samples=texts)


def score_texts(
    prompts: Sequence[Prompt],
    rewrites: Sequence[Sequence[str]] | None,
    responses: Sequence[Sequence[Sequence[str]]],
    reward: RewardStack,
    *,
    truncated: Tensor | None = None,
    truncation_penalty: float = 0.0,
) -> Scores:
    """Score P prompts × K rewrites × M responses given as text.

    Args:
        prompts: The original prompts.
        rewrites: [P][K], for the guards; None if nothing was rewritten.
        responses: [P][K][M].
        reward: The reward.
        truncated: (P, K) bool: samples that reached their token limit.
        truncation_penalty: Subtracted from the value of truncated samples.

    Raises:
        RewardError: A component of the reward failed; the message names the prompt.
    """
    K, M = len(responses[0]), len(responses[0][0])
    index = [(p, k, m) for p in range(len(prompts)) for k in range(K) for m in range(M)]
    scored = reward(
        [prompts[p] for p, _, _ in index],
        [responses[p][k][m] for p, k, m in index],
        None if rewrites is None else [rewrites[p][k] for p, k, _ in index],
    )
    rewards = torch.tensor(scored.values, dtype=torch.float32).view(len(prompts), K, M)
    values = rewards.mean(-1)
    metrics = {f"reward/{name}": sum(values) / len(values) for name, values in scored.components.items()}
    if truncated is not None:
        values = values - truncation_penalty * truncated
        metrics["sample/truncated"] = truncated.float().mean().item()
    return Scores(
        values, rewards, [list(g) for g in rewrites or []], [[list(r) for r in g] for g in responses], metrics
    )


def sampling_params(config: SamplingConfig, n: int) -> SamplingParams:
    """Convert the configuration to the engine's parameters; templates add their stop tokens."""
    return SamplingParams(n=n, **config.model_dump())


def _truncated(chains: Sequence[Sequence[Chain]]) -> Tensor:
    return torch.tensor([[c.sample.finish_reason == "length" for c in group] for group in chains])


def _mean_notes(chains: Sequence[Sequence[Chain]]) -> dict[str, float]:
    flat = [chain.notes for group in chains for chain in group]
    return {name: sum(notes[name] for notes in flat) / len(flat) for name in flat[0]}


def _refuse_errors(prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> None:
    """Raise if any chain failed: failure depends on what was sampled, so an estimate from the others would be biased."""
    for prompt, group in zip(prompts, chains, strict=True):
        for chain in group:
            for completion in (chain.sample, *chain.responses):
                if completion.error:
                    raise TrainingError(f"prompt {prompt.id} ({prompt.source or 'no source'}): {completion.error}")
