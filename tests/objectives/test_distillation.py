import pytest
import torch
from torch import Tensor

from alignpro.errors import ConfigError
from alignpro.objectives import Distillation, distillation_weights
from alignpro.theory import optimal_policy

LAMBDA = 0.4


def world(candidates: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """log ρ_sft and R of all rewrites of a prompt."""
    g = torch.Generator().manual_seed(seed)
    reference = torch.randn(candidates, generator=g, dtype=torch.float64).log_softmax(-1)
    return reference, torch.rand(candidates, generator=g, dtype=torch.float64)


def weights_of(old: Tensor, reference: Tensor, rewards: Tensor, step: float) -> Tensor:
    return distillation_weights(old, reference, rewards, len(rewards), LAMBDA, step)[0]


@pytest.mark.parametrize("step", [0.1, 0.25, 1.0])
def test_rounds_reach_the_optima_of_falling_lambda(step: float) -> None:
    reference, rewards = world()
    policy, left = reference, 1.0
    for _ in range(6):
        # With each rewrite as often as ρ_t draws it, the fit of a round is ρ_t times its weights.
        policy = (policy + weights_of(policy, reference, rewards, step).log()).log_softmax(-1)
        left *= 1 - step
        torch.testing.assert_close(policy, optimal_policy(reference, rewards, LAMBDA / (1 - left)), rtol=0, atol=1e-12)


def test_samples_of_the_optimum_weigh_the_same() -> None:
    reference, rewards = world()
    best = optimal_policy(reference, rewards, LAMBDA)
    sampled = torch.tensor([0, 3, 3, 6])  # any of them
    weights = weights_of(best[sampled], reference[sampled], rewards[sampled], 0.5)
    torch.testing.assert_close(weights, torch.full((4,), 0.25, dtype=torch.float64))


def test_samples_are_kept_by_their_weights() -> None:
    reference, rewards = world(5)
    weights, loss = weights_of(reference, reference, rewards, 1.0), Distillation(samples=20_000)
    drawn = loss.keep(weights, rewards, torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=5) / len(drawn)
    torch.testing.assert_close(share.double(), weights, rtol=0, atol=0.01)
    again = loss.keep(weights, rewards, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)


def test_nothing_is_kept_of_a_prompt_whose_rewards_are_equal() -> None:
    equal = torch.full((4,), 0.7)
    assert len(Distillation().keep(torch.full((4,), 0.25), equal, torch.Generator())) == 0


def test_bad_arguments_say_what_to_do() -> None:
    reference, rewards = world(8)
    for group, kl_coef, step, error, said in (
        (1, LAMBDA, 0.5, ConfigError, "use at least 2"),
        (4, 0.0, 0.5, ConfigError, "needs a positive λ"),
        (4, LAMBDA, 0.0, ConfigError, "expected a share"),
        (4, LAMBDA, 1.5, ConfigError, "expected a share"),
        (3, LAMBDA, 0.5, ValueError, "not a whole number of groups"),
    ):
        with pytest.raises(error, match=said):
            distillation_weights(reference, reference, rewards, group, kl_coef, step)
    with pytest.raises(ValueError, match="expected"):
        distillation_weights(reference[:4], reference, rewards, 4, LAMBDA, 0.5)
