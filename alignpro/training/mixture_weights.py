"""Rewrites that show what a mixture of prompters is worth, and which weights make its least normalised reward the largest."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignpro.config import TrainConfig
from alignpro.data import Prompt, choose, load_prompts, split_for_training
from alignpro.engine import Completion, Engine, SamplingParams, derive_seed
from alignpro.environments.base import sampling_params
from alignpro.environments.exact_mixture import correct_draws, group_logprobs
from alignpro.errors import ModelError
from alignpro.models.input_room import max_input_tokens
from alignpro.models.language_model import LanguageModel
from alignpro.models.mixed_model import MixedModel
from alignpro.prompting.length_filter import filter_overlong_prompts
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.theory import mirror_descent, sampled_mixture

_BATCH = 16
"""Prompts of a step of mirror descent."""


@dataclass(frozen=True)
class MixtureSamples:
    """Rewrites of ρ_sft and of each prompter to prompts on which these were trained."""

    config: TrainConfig
    """Of the first run: how rewrites are sampled."""
    inputs: list[list[int]]
    """[P] the prompters' inputs, as token ids."""
    params: SamplingParams
    """``n`` is m."""
    seeds: list[int]
    """[P]"""
    log_ratios: Tensor
    """(P, m, K) g_k of the rewrites, float64, nats."""
    shares: Tensor
    """(1 + K,) of the m rewrites, which ρ_sft and each prompter has drawn, float64."""

    def max_min_weights(self, seed: int) -> list[float]:
        """The weights that minimise F, by mirror descent over batches of these prompts."""
        generator = torch.Generator().manual_seed(derive_seed(seed, "mixture"))
        count = len(self.inputs)

        def draw(step: int) -> Tensor:
            return self.log_ratios[torch.randint(count, (min(_BATCH, count),), generator=generator)]

        found: list[float] = mirror_descent(draw, self.log_ratios.shape[2], shares=self.shares).tolist()
        return found

    def estimates(self, weights: Sequence[float]) -> dict[str, Any]:
        """F, the normalised reward λ E g_k of each prompter under the mixture, and how many rewrites count."""
        found = sampled_mixture(self.log_ratios, torch.tensor(weights, dtype=torch.float64), self.shares)
        return {
            "F": found.value.item(),
            "normalised_rewards": (self.config.objective.kl.coef * found.gradient).tolist(),
            "prompts": len(self.inputs),
            "rewrites": self.log_ratios.shape[1],
            "effective_sample_size": found.effective_sample_size.mean().item(),
        }

    def gap(self, mixture: LanguageModel) -> tuple[dict[str, float], list[list[Completion]]]:
        """How far the token-wise mixture is from that over whole rewrites, and its draws."""
        groups = _draw(mixture, self.config, self.inputs, self.params, self.seeds)
        if not isinstance(mixture, MixedModel):
            return {"total_variation": 0.0, "kl": 0.0, "effective_sample_size": float(self.params.n)}, groups
        found = correct_draws(mixture, self.inputs, groups, self.params.temperature)
        return {
            "total_variation": found.total_variation.mean().item(),
            "kl": found.kl.mean().item(),
            "effective_sample_size": found.effective_sample_size.mean().item(),
        }, groups


def sample_rewrites(
    configs: Sequence[TrainConfig],
    prompters: Sequence[LanguageModel],
    reference: LanguageModel,
    prompts: int,
    rewrites: int,
    seed: int,
) -> MixtureSamples:
    """Draw rewrites to training prompts, an equal share of each run's, and compute the prompters' log ratios.

    ρ_sft and each prompter draw an equal share of them: see `sampled_mixture`.

    Args:
        configs: Those of the K runs, for their data; the first one says how rewrites are sampled.
        prompters: K.
        reference: ρ_sft.
        prompts: P; fewer, if the runs have not so many together. Prompts of several runs count once.
        rewrites: m; at least one of each model.
        seed: Of the rewrites.

    Raises:
        DataError: The data of a run cannot be read, or no prompt fits.
    """
    config = configs[0]
    template = PrompterTemplate(prompters[0].tokenizer, config.prompting, stop_token_ids=prompters[0].end_token_ids)
    limit = max_input_tokens(prompters[0], config.rollout.rewrite, "the prompter", "rollout.rewrite")
    fitting = []
    for each in configs:
        training, _ = split_for_training(load_prompts(each.data).prompts, each.data, 0)
        fitting.append(filter_overlong_prompts(training, template.encode, min(each.prompting.max_prompt_tokens, limit)))
    inputs = [template.encode(prompt) for prompt in equal_shares(fitting, prompts)]
    models = [reference, *prompters]
    rewrites = max(rewrites, len(models))
    params = sampling_params(config.rollout.rewrite, rewrites)
    params = SamplingParams(**vars(params) | {"stop_token_ids": template.stop_token_ids})
    seeds = [derive_seed(seed, "mix", i) for i in range(len(inputs))]
    counts = [(rewrites + i) // len(models) for i in range(len(models))]
    groups: list[list[Completion]] = [[] for _ in inputs]
    for k, (model, count) in enumerate(zip(models, counts, strict=True)):
        own = [derive_seed(each, "model", k) for each in seeds]
        for group, drawn in zip(
            groups, _draw(model, config, inputs, SamplingParams(**vars(params) | {"n": count}), own), strict=True
        ):
            group += drawn
    before = group_logprobs(reference, inputs, groups, params.temperature)
    ratios = [group_logprobs(each, inputs, groups, params.temperature) - before for each in prompters]
    shares = torch.tensor(counts, dtype=torch.float64) / sum(counts)
    return MixtureSamples(config, inputs, params, seeds, torch.stack(ratios, dim=2), shares)


def equal_shares(sets: Sequence[Sequence[Prompt]], count: int) -> list[Prompt]:
    """Choose ``count`` prompts, as many of each set as of the others; what is in several sets counts once.

    Args:
        sets: Of prompts, such as those of each run.
        count: How many; fewer, if there are not so many different ones.
    """

    def chosen(share: int) -> dict[str, Prompt]:
        return {prompt.id: prompt for each in sets for prompt in choose(each, share)}

    share = bisect_left(range(count), count, key=lambda each: len(chosen(each)))
    found = chosen(max(0, share - 1))
    more = [prompt for name, prompt in chosen(share).items() if name not in found]
    return [*found.values(), *more[: count - len(found)]]


def _draw(
    model: LanguageModel,
    config: TrainConfig,
    inputs: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
) -> list[list[Completion]]:
    groups = Engine({"policy": model}, **config.rollout.engine.model_dump()).generate("policy", inputs, params, seeds)
    if error := next((each.error for group in groups for each in group if each.error), None):
        raise ModelError(f"model {model.name}: {error}")
    return groups
