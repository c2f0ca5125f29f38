"""Calibrated self-reward as an environment: the policy grows candidates, and its own likelihood and the target rank them.

    for each sentence:  every kept beginning ──policy──► some next sentences ──► responses of the target, reward of each (α > 0)
                        score = α · rank of the reward + (1 − α) · rank of the likelihood; keep the best and the worst
    in the end:         the best and the worst candidate, with rewards 1 and 0, or a group with its scores as rewards

Candidates are chosen, not drawn from the policy; the Gibbs loss regresses on log ρ/ρ_sft and R of any samples. Of a pair it is a
quarter of (λ (log-ratio of the best − that of the worst) − 1)², the loss of IPO (Azar et al., 2023, arXiv 2310.12036).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from alignpro.config import SelfRewardConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, Engine, SamplingParams, derive_seed
from alignpro.environments.base import Scores, refuse_errors, truncated_samples
from alignpro.environments.grown_candidates import Beams, Candidate, different
from alignpro.environments.prompt import PromptEnvironment
from alignpro.prompting.sentences import sentence_end_ids

TARGET_CALLS = "self_reward/target_calls"
"""The metric of how many responses the candidates of a prompt took."""


@dataclass
class GrownChain(Chain):
    """A candidate that was chosen, without responses of its own."""

    score: float = 0.5
    """Of its sentences, in [0, 1]."""
    calls: float = 0.0
    """Its share of the responses that the candidates of its prompt took."""
    sentences: int = 0


class SelfRewardEnvironment:
    """Grows candidates, and rewards the policy for those that rank high.

    Args:
        plain: Scores a rewrite by the target's responses: the external scorer. Its ``respond`` says how many there are to each
            candidate after each sentence.
        grown: How candidates are grown and scored.
    """

    def __init__(self, plain: PromptEnvironment, grown: SelfRewardConfig) -> None:
        unpenalised = plain.config.model_copy(update={"truncation_penalty": 0.0})  # a beginning has no end yet
        self._plain = plain
        self._asking = PromptEnvironment(plain.prompter, plain.target, plain.reward, plain.respond, unpenalised)
        self._grown = grown
        self._ends = frozenset(plain.prompter.stop_token_ids)
        self._stops = tuple(sorted({*self._ends, *sentence_end_ids(plain.prompter.chat.tokenizer)}))

    def encode(self, prompt: Prompt) -> list[int]:
        """The prompter's input: meta-prompt and template around x."""
        return self._plain.encode(prompt)

    def write_card(self, directory: Path, max_tokens: int) -> None:
        """Write the prompter's meta-prompt, and how to use both without this package."""
        self._plain.write_card(directory, max_tokens)

    def rollout(
        self, engine: Engine, prompts: Sequence[Prompt], params: SamplingParams, seeds: Sequence[int]
    ) -> list[list[Chain]]:
        """Grow candidates of each prompt, and choose ``params.n`` of them.

        Raises:
            TrainingError: A sentence or a response cannot be drawn; the message names the prompt.
        """
        grown = self._grown
        beams = [Beams(grown.beams, grown.alpha) for _ in prompts]
        calls = [0] * len(prompts)
        sampling = replace(
            params, n=grown.branches, max_tokens=params.max_tokens // grown.sentences, stop_token_ids=self._stops
        )
        for sentence in range(grown.sentences):
            if not any(own.live for own in beams):
                break
            drawn = self._draw(engine, prompts, beams, sampling, seeds, sentence)
            external = self._external(engine, prompts, drawn, seeds, sentence)
            for i, (own, candidates, scores) in enumerate(zip(beams, drawn, external, strict=True)):
                if candidates:
                    own.advance(candidates, scores)
                    calls[i] += len(candidates) * self._plain.respond.n if grown.alpha > 0 else 0
        return [
            [
                GrownChain(each.completion(), score=each.score, calls=count / params.n, sentences=len(each.scores))
                for each in own.chosen(params.n)
            ]
            for own, count in zip(beams, calls, strict=True)
        ]

    def score(self, prompts: Sequence[Prompt], chains: Sequence[Sequence[Chain]]) -> Scores:
        """Reward the chosen candidates: by their order if they are pairs, else with their scores."""
        groups = cast(Sequence[Sequence[GrownChain]], chains)
        scores = torch.tensor([[each.score for each in group] for group in groups], dtype=torch.float32)  # (P, K)
        truncated = truncated_samples(chains)
        values = scores
        if self._grown.feed == "pair":
            best, worst = scores.unbind(1)
            values = (
                torch.stack([best.sub(worst).sign(), worst.sub(best).sign()], 1).add(1.0).div(2.0)
            )  # ½ each if equal
        of_all = [each for group in groups for each in group]
        return Scores(
            values - self._plain.config.truncation_penalty * truncated,
            self._plain.rewrites_of(prompts, chains),
            {
                "self_reward/score": scores.mean().item(),
                "self_reward/spread": (scores.amax(1) - scores.amin(1)).mean().item(),
                "self_reward/sentences": sum(each.sentences for each in of_all) / len(of_all),
                TARGET_CALLS: sum(each.calls for each in of_all) / len(groups),
                "sample/truncated": truncated.float().mean().item(),
            },
        )

    def _draw(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        beams: Sequence[Beams],
        sampling: SamplingParams,
        seeds: Sequence[int],
        sentence: int,
    ) -> list[list[Candidate]]:
        """[P] the different beginnings that are one sentence longer; none of a prompt whose candidates have all ended."""
        places = [(i, j) for i, own in enumerate(beams) for j in range(len(own.live))]
        inputs = [[*self.encode(prompts[i]), *beams[i].live[j].tokens] for i, j in places]
        each = [derive_seed(seeds[i], "sentence", sentence, j) for i, j in places]
        groups = engine.generate("policy", inputs, sampling, each)
        refuse_errors([prompts[i] for i, _ in places], [[Chain(drawn) for drawn in group] for group in groups])
        drawn: list[list[Candidate]] = [[] for _ in prompts]
        for (i, j), group in zip(places, groups, strict=True):
            drawn[i] += [beams[i].live[j].grown(each, self._ends) for each in group]
        return [different(each) for each in drawn]

    def _external(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        drawn: Sequence[Sequence[Candidate]],
        seeds: Sequence[int],
        sentence: int,
    ) -> list[list[float]]:
        """[P] the mean reward of the target's responses to each beginning as it stands; zeros if they do not count."""
        if self._grown.alpha == 0:
            return [[0.0] * len(each) for each in drawn]
        places = [(i, j) for i, each in enumerate(drawn) for j in range(len(each))]
        begun = self._asking.begin_rollout(
            engine,
            [prompts[i] for i, _ in places],
            SamplingParams(),
            [derive_seed(seeds[i], "external", sentence, j) for i, j in places],
            [[drawn[i][j].completion()] for i, j in places],
        )
        values = iter(self._asking.score([prompts[i] for i, _ in places], begun()).values[:, 0].tolist())
        return [[next(values) for _ in each] for each in drawn]
