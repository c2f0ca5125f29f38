"""What a job asks of servers, by formula: requests, tokens and money, before anything is sent.

A group is a prompt of the target with the draws of its answer: a server that answers with ``n`` draws takes one request for it,
others one for each draw. A judge is asked about each response, in pairwise comparisons in both orders. Tokens of the models
in this process are counted as if they were the server's: tokenizers differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from alignpro.config import (
    EndpointConfig,
    EvalConfig,
    HeadroomConfig,
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
from alignpro.errors import BudgetError

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
            of_step, most = _of_training(config, 1), _of_training(config, config.run.steps)
        case RLHFConfig():
            of_step, most = _of_rlhf(config, 1), _of_rlhf(config, config.run.steps)
        case EvalConfig() | HeadroomConfig() | OptimalConfig():
            of_step, most = [], _of_comparison(config)
        case _:
            return []
    if not most:
        return []
    lines = [*_lines(config, "a step", of_step), *_lines(config, "in all", most)]
    return [*lines, *_budget(config, of_step, most)]


def check_budget(config: Section) -> None:
    """Check that the budget of a training run suffices for one step, before anything is sent.

    Below that, requests would wait for those in flight one after another, and the step could still not be finished.

    Raises:
        BudgetError: It may not suffice; the message says which limit, and what a step can take.
    """
    match config:
        case TrainConfig():
            of_step = _of_training(config, 1)
        case RLHFConfig():
            of_step = _of_rlhf(config, 1)
        case _:
            return
    for name, limit, total in _limits(config, of_step):
        if total > limit:
            raise BudgetError(
                f"budget.{name} is {_shown(name, limit)}, and a step can take {_shown(name, total)}: raise budget.{name} to at "
                "least that, or let a step take less (rollout.prompts_per_step, rewrites_per_prompt, respond.max_tokens, "
                "prompting.max_prompt_tokens); nothing has been sent"
            )


def _of_training(config: TrainConfig, steps: int) -> list[Asked]:
    """What steps ask, with the evaluations after them."""
    rollout = config.rollout
    answered = rollout.rewrites_per_prompt if config.self_reward is None else config.self_reward.answered
    groups = steps * rollout.prompts_per_step * answered + _evaluated(config, steps)
    draws, prompt_tokens = groups * rollout.responses_per_rewrite, config.prompting.max_prompt_tokens
    rewrite_tokens, answer_tokens = rollout.rewrite.max_tokens, rollout.respond.max_tokens
    unchanged = steps * rollout.prompts_per_step + _evaluated(config, steps) if config.reward.keeps_refusals else 0
    wanted = [(groups, draws), (unchanged, unchanged)]
    asked = _shared(config.target, wanted, prompt_tokens + rewrite_tokens, answer_tokens)
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


def _of_comparison(config: EvalConfig | HeadroomConfig | OptimalConfig) -> list[Asked]:
    """Every target of a mixture is asked everything."""
    P, M = config.prompts, config.responses_per_rewrite
    prompt_tokens, answer_tokens = (
        config.prompting.max_prompt_tokens + config.rewrite.max_tokens,
        config.respond.max_tokens,
    )
    match config:
        case EvalConfig():
            groups = _of_arms(config, config.sampled_arms, config.candidate_counts)
            for probed in _refusal_probes(config):
                groups += _of_arms(probed, probed.sampled_arms, probed.candidate_counts)
        case HeadroomConfig():
            groups = _of_arms(config, ["no_finetuning"], {})
            for task in config.tasks.values():
                groups += _of_arms(config, list(task.instructions), {})
            groups.append((P * max(config.gibbs_candidates), P * max(config.gibbs_candidates) * M))
            groups += _of_arms(config, list(config.gibbs_arms), {}) * len(config.tasks)
        case OptimalConfig():
            groups = [(P * config.candidates, P * config.candidates * M), (P, P * M)]
    samples = sum(draws for _, draws in groups)
    if isinstance(config, EvalConfig) and "oracle" in config.sampled_arms:
        samples += P * config.rewrites_per_prompt * M
    if any(reward.keeps_refusals for reward in config.rewards):
        # A greedy response to each unchanged prompt, which is not scored; also of those that refusals are counted on, if an arm
        # chooses their rewrites by the reward.
        probes = _refusal_probes(config) if isinstance(config, EvalConfig) else []
        chosen = isinstance(config, EvalConfig) and set(config.candidate_counts) & set(config.sampled_arms)
        unchanged = P + (sum(each.prompts for each in probes) if chosen else 0)
        groups.append((unchanged, unchanged))
    asked = _shared(config.target, groups, prompt_tokens, answer_tokens, split=False)
    samples *= len(target_parts(config.target))
    for reward in config.rewards:
        asked += _of_reward(reward, samples, prompt_tokens, answer_tokens)
    if isinstance(config, EvalConfig):
        asked += _of_judges(config, prompt_tokens, answer_tokens) + _of_harm(config, prompt_tokens, answer_tokens)
    return asked


def _refusal_probes(config: EvalConfig) -> list[EvalConfig]:
    """The evaluation as it is repeated on the prompts of each source of `refusals`."""
    refusals = config.refusals
    sources = [] if refusals is None else [each for each in (refusals.harmful, refusals.harmless) if each is not None]
    return [config.model_copy(update={"prompts": refusals.prompts}) for _ in sources if refusals is not None]


def _of_harm(config: EvalConfig, prompt_tokens: int, answer_tokens: int) -> list[Asked]:
    """What scoring harm asks: every response to a harmful prompt."""
    refusals = config.refusals
    if refusals is None or refusals.harm is None or (refusals.harmful is None and refusals.held_out != "harmful"):
        return []
    prompts = config.prompts if refusals.harmful is None else refusals.prompts
    each = len(config.sampled_arms) * config.rewrites_per_prompt * config.responses_per_rewrite
    samples = prompts * each * len(target_parts(config.target))
    return _of_reward(RewardConfig(components=[refusals.harm]), samples, prompt_tokens, answer_tokens)


def _of_judges(config: EvalConfig, prompt_tokens: int, answer_tokens: int) -> list[Asked]:
    """What judges are asked at most: each pair in both orders, and again up to ``attempts`` times."""
    judging = config.judge
    if judging is None:
        return []
    against = len(judging.against)
    comparisons = against * (len(config.sampled_arms) - against) + against * (against - 1) // 2
    pairs = comparisons * config.prompts * judging.pairs_per_prompt * len(target_parts(config.target))
    about = len(f"{judging.criteria}{judging.system or ''}".encode()) + RUBRIC_TOKENS
    requests = 2 * pairs * judging.attempts
    texts = prompt_tokens + 2 * answer_tokens
    return [Asked(each, requests, requests, texts + about, judging.max_tokens) for each in judging.endpoints]


def _of_arms(
    config: EvalConfig | HeadroomConfig, names: Sequence[str], candidates: Mapping[str, int]
) -> list[tuple[int, int]]:
    """(requests, draws) of the target in each arm, and of the candidates of those that choose among some."""
    P, K, M = config.prompts, config.rewrites_per_prompt, config.responses_per_rewrite
    dials = config.dial_arms if isinstance(config, EvalConfig) else {}
    several = ("sft_prompter", "align_pro", *dials, *config.gibbs_arms, *candidates)  # others have one rewrite or none
    groups = [(P * (K if name in several else 1), P * K * M) for name in names if name != "oracle"]
    if sizes := [count for name, count in candidates.items() if name in names]:
        groups.append((P * max(sizes), P * max(sizes) * M))
    return groups


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


def _budget(config: SpendingConfig, of_step: list[Asked], most: list[Asked]) -> list[str]:
    """Which limits the job could reach."""
    too_low = {name for name, limit, total in _limits(config, of_step) if total > limit}
    lines = []
    for name, limit, total in _limits(config, most):
        within = "is enough" if total <= limit else "may not be enough: the run then stops, saved, and --resume goes on"
        if name in too_low:
            within = "may not be enough for a single step: the run does not start"
        lines.append(f"the budget of {_shown(name, limit)}{'' if name == 'usd' else f' {name}'} {within}")
    return lines or ["no budget: nothing limits what is spent"]


def _limits(config: SpendingConfig, most: list[Asked]) -> list[tuple[str, Decimal | int, Decimal | int]]:
    """Each limit that there is, by name, with the most that is asked; without that in dollars if a price is not known."""
    prices = [each.usd(config) for each in most]
    totals = {
        "usd": None if None in prices else sum(price for price in prices if price is not None),
        "requests": sum(each.requests for each in most),
        "tokens": sum(each.tokens for each in most),
    }
    return [
        (name, limit, total)
        for name, total in totals.items()
        if total is not None and (limit := getattr(config.budget, name)) is not None
    ]


def _shown(name: str, amount: Decimal | int) -> str:
    return _dollars(Decimal(amount)) if name == "usd" else f"{amount:,}"


def _dollars(amount: Decimal) -> str:
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:,.6f}"
