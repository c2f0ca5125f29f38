"""The arms of a comparison: each samples responses to the same held-out prompts with its own method."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from alignpro.config import EvalConfig, HeadroomConfig, OptimalConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, Engine, SamplingParams, derive_seed
from alignpro.environments.base import ResponseScores, begin_scores, begun_scores, sampling_params
from alignpro.environments.build import prompt_environment
from alignpro.environments.instruction import InstructionEnvironment
from alignpro.environments.prompt import PromptEnvironment
from alignpro.environments.response import ResponseEnvironment, UnchangedPromptEnvironment
from alignpro.evaluation.labels import method_label
from alignpro.models.input_room import max_input_tokens
from alignpro.models.language_model import LanguageModel
from alignpro.objectives import GibbsResample, gibbs_resample
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.prompting.memory import Memory
from alignpro.prompting.memory_context import MemoryContext
from alignpro.prompting.rewrite_template import RewriteTemplate
from alignpro.prompting.target_prompt import SentRewrite
from alignpro.rewards import RewardStack
from alignpro.targets.base import Target
from alignpro.training.metrics import weighted_mean
from alignpro.training.progress import Advance, progress_bar

logger = logging.getLogger(__name__)

_CHUNK_PROMPTS, _CHUNK_RESPONSES = 32, 1024
"""At most so many prompts and, if it is more than one prompt, responses are sampled together: enough to fill an engine, and few
enough for a sign of life."""


def _show_nothing(metrics: Mapping[str, float], notes: Sequence[str] = (), steps: int = 1, /) -> None:
    pass


@dataclass
class ArmSamples:
    """The samples of an arm and their scores."""

    name: str
    chains: list[list[Chain]]
    """[P][K]; in an arm without rewrites, the samples are the responses."""
    scores: ResponseScores

    @property
    def raw(self) -> Tensor:
        """(P, K, M) rewards without penalties, on which arms are compared: only arms with rewrites pay penalties.

        In an arm without rewrites (P, 1, K), with its K responses on the last axis.
        """
        return self._nested(self.scores.raw)

    @property
    def penalised(self) -> Tensor:
        """Likewise the rewards minus the penalties of guards and of truncation, which training and resampling maximise."""
        return self._nested(self.scores.penalised)

    @property
    def scores_rewrites(self) -> bool:
        """Whether the samples are rewrites with responses of a target."""
        return bool(self.chains[0][0].responses)

    def _nested(self, rewards: Tensor) -> Tensor:
        return rewards if self.scores_rewrites else rewards.transpose(1, 2)

    def first(self, count: int) -> ArmSamples:
        """The first ``count`` samples of each prompt."""
        scores = self.scores
        cut = replace(
            scores,
            values=scores.values[:, :count],
            samples=[group[:count] for group in scores.samples],
            rewards=scores.rewards[:, :count],
            raw=scores.raw[:, :count],
            penalised=scores.penalised[:, :count],
            responses=[group[:count] for group in scores.responses],
        )
        return ArmSamples(self.name, [group[:count] for group in self.chains], cut)


_Begin = Callable[[range], Callable[[], list[list[Chain]]]]
"""The places of some prompts → what returns their chains, once these are there."""
_Environment = PromptEnvironment | ResponseEnvironment | UnchangedPromptEnvironment | InstructionEnvironment


@dataclass
class ArmSampler:
    """Samples arms on a set of prompts with one target and one reward; all arms use the same seed for a prompt.

    The number of responses per prompt is the same in every arm: K rewrites × M responses, or K·M responses.
    """

    config: EvalConfig | HeadroomConfig | OptimalConfig
    prompts: Sequence[Prompt]
    target: Target
    reward: RewardStack
    memory: Memory | None = None
    """Past rewrites that all prompters see, so that they are compared in the same context."""
    advance: Advance = _show_nothing
    """Called with the mean reward of each chunk of prompts, and its number of responses."""

    def progress(self, responses: int) -> AbstractContextManager[Advance]:
        """A progress bar over so many responses to each prompt."""
        return progress_bar(responses * len(self.prompts), 0, ("reward",), unit="response")

    def sample_unchanged(self, count: int) -> ArmSamples:
        """Draw ``count`` responses of the target to each original prompt: no fine-tuning."""
        environment = UnchangedPromptEnvironment(self.target, self.reward)
        return self._sample("no_finetuning", environment, self._engine(), sampling_params(self.config.respond, count))

    def sample_instruction(self, name: str, template: RewriteTemplate, count: int) -> ArmSamples:
        """Draw ``count`` responses of the target to each prompt as a hand-written instruction rewrites it."""
        environment = InstructionEnvironment(template, self.target, self.reward)
        return self._sample(name, environment, self._engine(), sampling_params(self.config.respond, count))

    def sample_oracle(self, oracle: LanguageModel, template: ChatTemplate, count: int) -> ArmSamples:
        """Draw ``count`` responses of the oracle to each original prompt."""
        environment = ResponseEnvironment(template, self.reward)
        engine = Engine({"policy": oracle}, **self.config.engine.model_dump())
        return self._sample("oracle", environment, engine, sampling_params(self.config.respond, count))

    def sample_rewrites(self, name: str, prompter: LanguageModel, count: int) -> ArmSamples:
        """Draw ``count`` rewrites per prompt from a prompter, with the target's responses to each."""
        params = sampling_params(self.config.rewrite, count)
        return self._sample(name, self.environment(prompter), self._engine({"policy": prompter}), params)

    def environment(self, prompter: LanguageModel) -> PromptEnvironment:
        """The environment of the chain prompter → target → reward."""
        config, memory = self.config, None
        if self.memory is not None:
            limit = max_input_tokens(prompter, config.rewrite, "the prompter", "rewrite")
            memory = MemoryContext(self.memory, min(config.prompting.max_prompt_tokens, limit), config.prompting.form)
        return prompt_environment(
            prompter,
            self.target,
            self.reward,
            config.prompting,
            config.respond,
            responses=config.responses_per_rewrite,
            memory=memory,
        )

    def resample(
        self, candidates: ArmSamples, prompter: LanguageModel, weights: Tensor, count: int, name: str = "gibbs"
    ) -> ArmSamples:
        """Resample ``count`` candidates per prompt and draw new responses of the target.

        The resampled rewrites are not scored with the responses that selected them, which would favour lucky ones.

        Args:
            candidates: Rewrites of ρ_sft.
            prompter: ρ_sft, for its template.
            weights: (P, N) probability of each candidate, such as those of `gibbs_weights`.
            count: Rewrites to keep of each prompt, drawn with replacement.
            name: The arm's key.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "gibbs"))
        chosen = torch.multinomial(weights.double(), count, replacement=True, generator=generator).tolist()
        environment = self.environment(prompter)
        chosen_chains = [[group[j] for j in row] for group, row in zip(candidates.chains, chosen, strict=True)]
        engine = self._engine()

        def respond(places: Sequence[int]) -> list[list[Chain]]:
            groups = [chosen_chains[i] for i in places]
            chains = [chain for group in groups for chain in group]
            own = environment.rewrites_of([self.prompts[i] for i in places], groups)
            rewrites = [each for group in own for each in group]
            begin = begin_scores(self.reward, [self.prompts[i] for i in places for _ in range(count)], self.target.text)
            with begun_scores(self.reward):
                responses = self.target.respond(
                    engine,
                    [each.target_prompt for each in chains if isinstance(each.target_prompt, SentRewrite)],
                    environment.respond,
                    [derive_seed(self.config.seed, "fresh", i, k) for i in places for k in range(count)],
                    None if begin is None else lambda number, own: begin(number, rewrites[number], own),
                )
            of_each = iter(responses)
            return [[replace(chain, responses=next(of_each)) for chain in group] for group in groups]

        return self._in_chunks(
            name, environment, count * environment.respond.n, lambda places: partial(respond, places)
        )

    def scored(self, samples: ArmSamples, prompter: LanguageModel | None) -> ArmSamples:
        """The same samples with the scores of this sampler's reward: of rewrites of ``prompter``, or of unchanged prompts."""
        environment = (
            UnchangedPromptEnvironment(self.target, self.reward) if prompter is None else self.environment(prompter)
        )
        return ArmSamples(samples.name, samples.chains, environment.score(self.prompts, samples.chains))

    def gibbs_weights(self, candidates: ArmSamples, kl_coef: float) -> GibbsResample:
        """The closed-form weights of the candidates, with λ log Ẑ and the effective sample size."""
        return gibbs_resample(candidates.scores.values.double(), kl_coef)

    def _engine(self, models: Mapping[str, LanguageModel] | None = None) -> Engine:
        return Engine({**(models or {}), **self.target.models}, **self.config.engine.model_dump())

    def _sample(self, name: str, environment: _Environment, engine: Engine, params: SamplingParams) -> ArmSamples:
        def begin(places: range) -> Callable[[], list[list[Chain]]]:
            seeds = [derive_seed(self.config.seed, "evaluation", i) for i in places]
            prompts = [self.prompts[i] for i in places]
            if isinstance(environment, PromptEnvironment) and self.target.remote:
                return environment.begin_rollout(engine, prompts, params, seeds)
            return lambda: environment.rollout(engine, prompts, params, seeds)

        answers = environment.respond.n if isinstance(environment, PromptEnvironment) else 1
        return self._in_chunks(name, environment, params.n * answers, begin)

    def _in_chunks(
        self,
        name: str,
        environment: _Environment,
        responses: int,
        begin: _Begin,
    ) -> ArmSamples:
        """Sample and score the prompts chunk by chunk; each prompt has its own seed, so chunks do not change samples.

        A chunk is begun before the chains of the last one are there, so that a server answers those while this one's rewrites
        are sampled.
        """
        logger.info("%s: %d prompts", method_label(name), len(self.prompts))
        size = max(1, min(_CHUNK_PROMPTS, _CHUNK_RESPONSES // responses))
        ends = [*range(size, len(self.prompts), size), len(self.prompts)]
        chunks = [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        parts, begun = list[ArmSamples](), begin(chunks[0])
        for number, places in enumerate(chunks):
            finish = begun
            if number + 1 < len(chunks):
                begun = begin(chunks[number + 1])
            chains = finish()
            scores = environment.score([self.prompts[i] for i in places], chains)
            parts.append(ArmSamples(name, chains, scores))
            self.advance({"reward": scores.values.mean().item()}, (), responses * len(places))
        return _joined(parts)


def _joined(parts: Sequence[ArmSamples]) -> ArmSamples:
    """The samples of all prompts."""
    scores = [part.scores for part in parts]
    return ArmSamples(
        parts[0].name,
        [group for part in parts for group in part.chains],
        ResponseScores(
            torch.cat([each.values for each in scores]),
            [group for each in scores for group in each.samples],
            weighted_mean([each.metrics for each in scores], [len(each.values) for each in scores]),
            rewards=torch.cat([each.rewards for each in scores]),
            raw=torch.cat([each.raw for each in scores]),
            penalised=torch.cat([each.penalised for each in scores]),
            responses=[group for each in scores for group in each.responses],
        ),
    )
