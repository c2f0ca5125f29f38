"""The bound holds for every finite problem, and its sampled version estimates its exact one."""

import math

import pytest
import torch
from torch.distributions import Categorical

from alignpro.errors import ConfigError
from alignpro.theory import (
    divergence_term,
    exact_bound,
    expected_reward,
    kl_divergence,
    optimal_policy,
    sampled_bound,
)

R_MAX = 2.0
SIZES = (1, 5), (1, 13), (2, 13)
"""Ranges of the numbers of prompts, rewrites and responses of a random world."""
LOGARITHMS = (math.log(0.05), math.log(8)), (math.log(0.02), math.log(5))
"""Ranges of the logarithms of its sharpness and of its λ."""


def make_problem(seed: int, prompts: int = 4, rewrites: int = 5, responses: int = 6, sharpness: float = 2.0) -> dict:
    """Return a random finite problem; a higher sharpness gives distributions that differ more."""
    g = torch.Generator().manual_seed(seed)

    def distribution(*shape: int) -> torch.Tensor:
        return (sharpness * torch.randn(*shape, generator=g, dtype=torch.float64)).log_softmax(-1)

    return {
        "oracle": distribution(prompts, responses),
        "target": distribution(prompts, responses),
        "target_rewritten": distribution(prompts, rewrites, responses),
        "prompter": distribution(prompts, rewrites),
        "reference": distribution(prompts, rewrites),
        "reward": R_MAX * torch.rand(prompts, responses, generator=g, dtype=torch.float64),
    }


def rewrite_values(problem: dict) -> torch.Tensor:
    """Return R(x, x'), (X, C)."""
    return expected_reward(problem["target_rewritten"], problem["reward"].unsqueeze(1))


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 5.0])
def test_bound_holds_for_any_prompter(sharpness: float) -> None:
    for seed in range(100):
        bound = exact_bound(**make_problem(seed, sharpness=sharpness), r_max=R_MAX)
        assert bound.slack >= -1e-9 and bound.lhs <= bound.rhs


@pytest.mark.parametrize("kl_coef", [0.05, 1.0])
def test_bound_in_the_papers_form_holds_for_the_optimal_prompter(kl_coef: float) -> None:
    for seed in range(100):
        problem = make_problem(seed)
        problem["prompter"] = optimal_policy(problem["reference"], rewrite_values(problem), kl_coef)
        bound = exact_bound(**problem, r_max=R_MAX)
        paper = -kl_coef * kl_divergence(problem["prompter"], problem["reference"]).mean().item()
        assert -bound.prompter_gain <= paper  # ours is tighter
        assert bound.lhs <= bound.rhs <= bound.target_shift + bound.rewrite_shift + paper


def test_bound_holds_in_a_thousand_random_worlds() -> None:
    """Worlds of 1 to 4 prompts, up to 12 rewrites and responses, and nearly uniform to nearly certain distributions.

    The oracle and two in three prompters are optimal for a λ between .02 and 5, as training makes them.
    """
    slack = []
    for seed in range(1000):
        g = torch.Generator().manual_seed(seed)
        prompts, rewrites, responses = (int(torch.randint(low, high, (), generator=g)) for low, high in SIZES)
        sharpness, kl_coef = (math.exp(float(torch.empty(()).uniform_(*each, generator=g))) for each in LOGARITHMS)
        problem = make_problem(seed, prompts, rewrites, responses, sharpness)
        problem["oracle"] = optimal_policy(problem["target"], problem["reward"], kl_coef)
        if seed % 3:
            problem["prompter"] = optimal_policy(problem["reference"], rewrite_values(problem), kl_coef)
        slack.append(exact_bound(**problem, r_max=R_MAX).slack / R_MAX)
    assert min(slack) >= 0
    least_median_most = torch.tensor(slack).quantile(torch.tensor([0.0, 0.5, 1.0])).tolist()
    assert least_median_most == pytest.approx([0.04, 0.51, 1.96], abs=0.01)  # as docs/training.md says


def test_bound_is_reached_when_nothing_is_lost() -> None:
    """The oracle always gives the right response and the target a wrong one, so that both sides are r_max."""
    sure = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    problem = {
        "oracle": sure,
        "target": sure.flip(1),
        "target_rewritten": sure.flip(1).unsqueeze(1),
        "prompter": torch.zeros(1, 1, dtype=torch.float64),
        "reference": torch.zeros(1, 1, dtype=torch.float64),
        "reward": torch.tensor([[R_MAX, 0.0]], dtype=torch.float64),
    }
    bound = exact_bound(**problem, r_max=R_MAX)
    assert bound.lhs == bound.rhs == R_MAX


@pytest.mark.parametrize("kl_coef", [0.05, 1.0])
def test_the_last_term_is_a_difference_of_rewards_for_every_prompter(kl_coef: float) -> None:
    for seed in range(20):
        problem = make_problem(seed)
        values = rewrite_values(problem)
        term = divergence_term(problem["prompter"], problem["reference"], values, kl_coef)
        difference = expected_reward(problem["reference"], values) - expected_reward(problem["prompter"], values)
        torch.testing.assert_close(term, difference, rtol=0, atol=1e-12)


def draw(logprob: torch.Tensor, count: int) -> torch.Tensor:
    """Draw samples of each row, (..., count)."""
    return Categorical(logits=logprob).sample((count,)).movedim(0, -1)


def test_sampled_bound_estimates_the_exact_one() -> None:
    torch.manual_seed(0)
    count, problem = 4000, make_problem(1)
    reward = problem["reward"]
    oracle = draw(problem["oracle"], count)  # (X, n) y ~ π*(.|x)

    def respond(rewrites: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return y ~ π_F(.|x') for each rewrite, (X, n), and log π_F(.|x') of all responses, (X, n, Y)."""
        rows = problem["target_rewritten"].gather(1, rewrites.unsqueeze(-1).expand(-1, -1, reward.shape[1]))
        return Categorical(logits=rows).sample(), rows

    trained, _ = respond(draw(problem["prompter"], count))
    plain, plain_rows = respond(draw(problem["reference"], count))
    bound = sampled_bound(
        oracle_rewards=reward.gather(1, oracle),
        prompter_rewards=reward.gather(1, trained),
        reference_rewards=reward.gather(1, plain),
        r_max=R_MAX,
        oracle_logprobs=(problem["oracle"].gather(1, oracle), problem["target"].gather(1, oracle)),
        rewrite_logprobs=(
            plain_rows.gather(2, plain.unsqueeze(-1)).squeeze(-1),
            problem["target"].gather(1, plain),
        ),
    )
    exact = exact_bound(**problem, r_max=R_MAX)
    for name in ("lhs", "rhs", "target_shift", "rewrite_shift", "prompter_gain"):
        assert getattr(bound, name) == pytest.approx(getattr(exact, name), abs=0.06), name
    assert bound.slack > 0 and bound.missing is None
    assert bound.lhs_stderr > 0 and bound.rhs_stderr > 0


def test_without_logprobs_the_bound_is_not_computable_and_not_estimated() -> None:
    rewards = torch.rand(3, 4)
    arguments = {"oracle_rewards": rewards, "prompter_rewards": rewards, "reference_rewards": rewards, "r_max": 1.0}
    logprobs = (torch.zeros(3, 4), torch.zeros(3, 4))
    for pairs in ((None, logprobs), (logprobs, None), (None, None)):
        bound = sampled_bound(**arguments, oracle_logprobs=pairs[0], rewrite_logprobs=pairs[1])
        assert bound.rhs is None and bound.slack is None and bound.slack_per_prompt is None
        assert bound.missing == "not computable: the target gives no log-probabilities"
        assert bound.lhs == 0.0


def test_rewards_outside_the_range_are_refused() -> None:
    problem = make_problem(0)
    with pytest.raises(ConfigError, match=r"reward ranges from .* rewards in \[0, 1\]"):
        exact_bound(**problem, r_max=1.0)
    rewards = torch.tensor([[0.5], [-0.1]])
    with pytest.raises(ConfigError, match=r"oracle_rewards ranges from -0\.1"):
        sampled_bound(
            oracle_rewards=rewards,
            prompter_rewards=rewards,
            reference_rewards=rewards,
            r_max=1.0,
            oracle_logprobs=None,
            rewrite_logprobs=None,
        )
    with pytest.raises(ConfigError, match="reward ranges from"):
        exact_bound(**(problem | {"reward": problem["reward"] * torch.nan}), r_max=R_MAX)


@pytest.mark.parametrize("r_max", [0.1, 49.9, 1000.1])
def test_rewards_at_the_ends_of_the_range_are_within_it_in_float32(r_max: float) -> None:
    """49.9 in float32 is above 49.9, and a sum of weights may be a little below 0."""
    rewards = torch.tensor([[r_max, -1e-8 * r_max]] * 3, dtype=torch.float32)
    settings = {"oracle_logprobs": None, "rewrite_logprobs": None}
    bound = sampled_bound(
        oracle_rewards=rewards, prompter_rewards=rewards, reference_rewards=rewards, r_max=r_max, **settings
    )
    assert bound.lhs == 0
    with pytest.raises(ConfigError, match="oracle_rewards ranges from"):
        sampled_bound(
            oracle_rewards=1.01 * rewards,
            prompter_rewards=rewards,
            reference_rewards=rewards,
            r_max=r_max,
            **settings,
        )
