"""What a job asks of servers, by formula: requests, tokens and money, before anything is sent.

A group is a prompt of the target with the draws of its answer: a server that answers with ``n`` draws takes one request for it,
others one for each draw. A judge is asked about each response, in pairwise comparisons in both orders. Tokens of the models
in this process are counted as if they were the server's: tokenizers differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from alignpro.config import (
    EndpointConfig,
    EvalConfig,
    HTTPRewardConfig,
    JudgeRewardConfig,
    OptimalConfig,
    RewardConfig,
    RLHFConfig,
    Section,
    SpendingConfig,
    TargetConfig,
    TargetEndpointConfig,
    TrainConfig,
    target_parts,
)

RUBRIC_TOKENS = 1024
"""Allowed for a judge's rubric without its texts; a token is at least a byte, and the built-in ones have less than 1,000."""


@dataclass(frozen=True)
class Asked:
    """The most that is asked of one server."""

    endpoint: EndpointConfig
    groups: int
    draws: int
    """Of all groups together."""
    prompt_tokens: int
    """Of one request."""
    answer_tokens: int
    """Of one draw."""

    @property
    def requests(self) -> int:
        """One for each group if it is known that the server answers with ``n`` draws, else one for each draw."""
        return self.groups if self.endpoint.n else self.draws

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.requests * self.prompt_tokens + self.draws * self.answer_tokens

    def usd(self, spending: SpendingConfig) -> Decimal | None:
        """The price, if there is one for the model."""
        price = spending.prices.get(self.endpoint.model)
        if price is None:
            return None
        per_token = self.requests * self.prompt_tokens * price.input + self.draws * self.answer_tokens * price.output
        return per_token / 1_000_000 + self.requests * price.request


def describe_spending(config: Section) -> list[str]:
    """Lines that say what a job asks of servers at most and what that costs; none if it asks none."""
    match config:
        case TrainConfig():
            lines, most = _lines(config, "a step", _of_training(config, 1)), _of_training(config, config.run.steps)
        case RLHFConfig():
            lines, most = _lines(config, "a step", _of_rlhf(config, 1)), _of_rlhf(config, config.run.steps)
        case EvalConfig() | OptimalConfig():
            lines, most = [], _of_comparison(config)
        case _:
            return []
    if not most:
        return []
    return [*lines, *_lines(config, "in all", most), *_budget(config, most)]


def _of_training(config: TrainConfig, steps: int) -> list[Asked]:
    """What steps ask, with the evaluations after them."""
    rollout = config.rollout
    groups = steps * rollout.prompts_per_step * rollout.rewrites_per_prompt + _evaluated(config, steps)
    draws, prompt_tokens = groups * rollout.responses_per_rewrite, config.prompting.max_prompt_tokens
    rewrite_tokens, answer_tokens = rollout.rewrite.max_tokens, rollout.respond.max_tokens
    asked = _shared(config.target, [(groups, draws)], prompt_tokens + rewrite_tokens, answer_tokens)
    return asked + _of_reward(config.reward, draws, prompt_tokens + rewrite_tokens, answer_tokens)


def _evaluated(config: TrainConfig | RLHFConfig, steps: int) -> int:
    """Number of prompts evaluated in so many steps; a run that selects its best checkpoint evaluates the last one, too."""
    every = config.run.eval_every
    if not every:
        return 0
    last = config.selects_best and steps == config.run.steps and steps % every > 0
    return (steps // every + last) * config.run.eval_prompts


def _of_rlhf(config: RLHFConfig, steps: int) -> list[Asked]:
    rollout = config.rollout
    samples = steps * rollout.prompts_per_step * rollout.responses_per_prompt + _evaluated(config, steps)
    return _of_reward(config.reward, samples, config.max_prompt_tokens, rollout.respond.max_tokens)


def _of_reward(reward: RewardConfig, samples: int, prompt_tokens: int, answer_tokens: int) -> list[Asked]:
    """What scoring samples asks at most: a judge whose answers cannot be read is asked again, up to its ``attempts``."""
    asked = []
    for each in reward.components:
        if isinstance(each, JudgeRewardConfig):
            requests = samples * each.attempts * (2 if each.mode == "pairwise" else 1)
            about = len(f"{each.criteria}{each.system or ''}".encode()) + RUBRIC_TOKENS
            texts = prompt_tokens + answer_tokens * (1 if each.reference is None else 2)
            asked.append(Asked(each.endpoint, requests, requests, texts + about, each.max_tokens))
        elif isinstance(each, HTTPRewardConfig):
            requests = -(-samples // (each.batch_size or 1))
            asked.append(Asked(each.server.endpoint()[0], requests, requests, 0, 0))
    return asked


def _of_comparison(config: EvalConfig | OptimalConfig) -> list[Asked]:
    """Every target of a mixture is asked everything."""
    P, M = config.prompts, config.responses_per_rewrite
    if isinstance(config, OptimalConfig):
        groups = [(P * config.candidates, P * config.candidates * M), (P, P * M)]
    else:
        K = config.rewrites_per_prompt
        groups = [(P, P * K * M)]  # no fine-tuning
        groups += [(P * K, P * K * M)] * sum(each is not None for each in (config.prompter, config.reference))
        if config.gibbs_candidates:
            groups += [(P * config.gibbs_candidates, P * config.gibbs_candidates * M), (P * K, P * K * M)]
    prompt_tokens, answer_tokens = (
        config.prompting.max_prompt_tokens + config.rewrite.max_tokens,
        config.respond.max_tokens,
    )
    samples = sum(draws for _, draws in groups)
    if isinstance(config, EvalConfig) and config.oracle is not None:
        samples += P * config.rewrites_per_prompt * M
    asked = _shared(config.target, groups, prompt_tokens, answer_tokens, split=False)
    samples *= len(target_parts(config.target))
    return asked + _of_reward(config.reward, samples, prompt_tokens, answer_tokens)


def _shared(
    target: TargetConfig, groups: list[tuple[int, int]], prompt_tokens: int, answer_tokens: int, split: bool = True
) -> list[Asked]:
    """What each server gets of groups of draws: those of a mixture on average, by their weights."""
    parts = target_parts(target)
    total = sum(part.weight for part in parts)
    asked = []
    for part in parts:
        source = part.source
        if isinstance(source, TargetEndpointConfig):
            share = part.weight / total if split else 1.0
            around = len(f"{source.system or ''}{source.wrapper or ''}".encode())
            counts = [round(share * sum(column)) for column in zip(*groups, strict=True)]
            asked.append(Asked(source, counts[0], counts[1], prompt_tokens + around, answer_tokens))
    return asked


def _lines(config: SpendingConfig, when: str, most: list[Asked]) -> list[str]:
    lines = []
    for each in most:
        usd = each.usd(config)
        cost = "no price is given" if usd is None else _dollars(usd)
        lines.append(
            f"{each.endpoint.model} at {each.endpoint.base_url}, {when}: at most {each.requests:,} requests and "
            f"{each.tokens:,} tokens ({each.prompt_tokens:,} of a prompt, {each.answer_tokens:,} of an answer): {cost}"
        )
    return lines


def _budget(config: SpendingConfig, most: list[Asked]) -> list[str]:
    """Which limits the job could reach."""
    budget = config.budget
    prices = [each.usd(config) for each in most]
    totals = {
        "usd": None if None in prices else sum(price for price in prices if price is not None),
        "requests": sum(each.requests for each in most),
        "tokens": sum(each.tokens for each in most),
    }
    lines = []
    for name, total in totals.items():
        limit = getattr(budget, name)
        if limit is not None and total is not None:
            shown = _dollars(limit) if name == "usd" else f"{limit:,} {name}"
            within = (
                "is enough" if total <= limit else "may not be enough: the run then stops, saved, and --resume goes on"
            )
            lines.append(f"the budget of {shown} {within}")
    return lines or ["no budget: nothing limits what is spent"]


def _dollars(amount: Decimal) -> str:
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:,.6f}"
