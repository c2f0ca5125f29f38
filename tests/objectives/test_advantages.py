import pytest
import torch

from alignpro.errors import ConfigError
from alignpro.objectives import (
    GAE,
    Advantage,
    GroupNormalized,
    LeaveOneOut,
    RunningBaseline,
    SampledReturns,
    final_return,
    returns_to_go,
    token_rewards,
)

# Two prompts of three rewrites each, of lengths 3, 1, 2 and 2, 2, 3.
MASK = torch.arange(3) < torch.tensor([3, 1, 2, 2, 2, 3])[:, None]
SCORES = torch.tensor([1.0, 2.0, 4.0, 0.0, 8.0, 3.0], dtype=torch.float64)


def random_rewards() -> torch.Tensor:
    kl = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return token_rewards(SCORES, MASK, 0.5, "exact", kl=kl)


def compute(advantage: Advantage, returns: torch.Tensor, mask: torch.Tensor, scores: torch.Tensor, group: int):
    return advantage(SampledReturns(returns, returns, mask, scores, group))


def gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, lam: float):
    return GAE(lam)(SampledReturns(rewards, returns_to_go(rewards, mask), mask, SCORES[: len(mask)], 3, values))


def test_the_return_is_the_sum_of_the_remaining_rewards() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0], [8.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert returns_to_go(rewards, mask).tolist() == [[7.0, 6.0, 4.0], [8.0, 0.0, 0.0]]


def test_leave_one_out_by_hand_on_ragged_rows() -> None:
    returns = torch.tensor([[10.0, 20.0, 30.0], [5.0, 0.0, 0.0], [7.0, 9.0, 0.0]])
    mask = MASK[:3]
    scores = torch.tensor([30.0, 5.0, 9.0])
    # After its end a row counts with its score: 5 for the second row everywhere, 9 for the third at the last position.
    expected = [
        [10 - (5 + 7) / 2, 20 - (5 + 9) / 2, 30 - (5 + 9) / 2],
        [5 - (10 + 7) / 2, 0, 0],
        [7 - (10 + 5) / 2, 9 - (20 + 5) / 2, 0],
    ]
    assert compute(LeaveOneOut(), returns, mask, scores, 3).tolist() == expected


def test_the_baseline_does_not_depend_on_the_row_itself() -> None:
    returns = returns_to_go(random_rewards(), MASK)
    base = returns - compute(LeaveOneOut(), returns, MASK, SCORES, 3)
    changed, scores = returns.clone(), SCORES.clone()
    changed[1, 0] += 100  # the second row has one action
    scores[1] += 100
    moved = changed - compute(LeaveOneOut(), changed, MASK, scores, 3)
    torch.testing.assert_close(moved[1], base[1])
    assert (moved[0][MASK[0]] != base[0][MASK[0]]).all()
    torch.testing.assert_close(moved[3:], base[3:])  # another prompt


def test_without_kl_leave_one_out_is_the_score_less_the_others_mean() -> None:
    returns = returns_to_go(token_rewards(SCORES, MASK, 0.0, "k2"), MASK)
    advantages = compute(LeaveOneOut(), returns, MASK, SCORES, 3)
    expected = torch.tensor([1 - 3.0, 2 - 2.5, 4 - 1.5, 0 - 5.5, 8 - 1.5, 3 - 4.0], dtype=torch.float64)
    torch.testing.assert_close(advantages, torch.where(MASK, expected[:, None], 0.0))


def test_group_normalized_is_grpo() -> None:
    returns = returns_to_go(token_rewards(SCORES, MASK, 0.0, "k3"), MASK)
    sampled = SampledReturns(returns, returns, MASK, SCORES, 3)
    advantages = GroupNormalized()(sampled) * GroupNormalized().weights(sampled)[:, None]
    groups = SCORES.view(2, 3)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(advantages, torch.where(MASK, expected.flatten()[:, None], 0.0))


def test_a_group_of_equal_scores_has_no_advantage() -> None:
    same = torch.full((6,), 2.5, dtype=torch.float64)
    returns = returns_to_go(token_rewards(same, MASK, 0.0, "k2"), MASK)
    assert (compute(GroupNormalized(), returns, MASK, same, 3) == 0).all()
    assert (compute(LeaveOneOut(), returns, MASK, same, 3) == 0).all()


def test_gae_at_one_is_return_less_value_and_at_zero_one_step() -> None:
    rewards = random_rewards()
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    full = gae(rewards, values, MASK, 1.0)
    returns = returns_to_go(rewards, MASK)
    torch.testing.assert_close(full, torch.where(MASK, returns - values, 0.0))
    torch.testing.assert_close(full + torch.where(MASK, values, 0.0), returns)  # the critic's targets
    one_step = gae(rewards, values, MASK, 0.0)
    last = MASK.sum(1) - 1
    for row in range(6):
        for t in range(int(last[row]) + 1):
            after = values[row, t + 1] if t < last[row] else 0.0  # truncated or ended: nothing follows the last action
            torch.testing.assert_close(one_step[row, t], rewards[row, t] + after - values[row, t])


def test_gae_weighs_steps_geometrically() -> None:
    rewards, values = random_rewards()[:1], torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)
    mask, lam = MASK[:1], 0.6
    deltas = rewards + torch.tensor([[-0.2, 0.5, 0.0]], dtype=torch.float64) - values
    advantages = gae(rewards, values, mask, lam)
    torch.testing.assert_close(advantages[0, 0], deltas[0, 0] + lam * deltas[0, 1] + lam**2 * deltas[0, 2])


def test_running_baseline_comes_from_earlier_steps() -> None:
    baseline = RunningBaseline(decay=0.9)
    returns = returns_to_go(random_rewards(), MASK)
    torch.testing.assert_close(compute(baseline, returns, MASK, SCORES, 3), returns)  # there is no earlier step
    baseline.update(3.0)
    assert baseline.value == pytest.approx(3.0)  # corrected for its start
    baseline.update(5.0)
    assert baseline.value == pytest.approx((0.9 * 3 + 5) / 1.9)
    torch.testing.assert_close(
        compute(baseline, returns, MASK, SCORES, 3), torch.where(MASK, returns - baseline.value, 0.0)
    )
    restored = RunningBaseline(decay=0.9)
    restored.load_state_dict(baseline.state_dict())
    assert restored.value == baseline.value


def test_equal_scores_weigh_nothing_however_much_the_kl_differs() -> None:
    kl = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.tensor([0.5, 0.5, 0.5, 0.0, 1.0, 0.5], dtype=torch.float64)
    returns = returns_to_go(token_rewards(scores, MASK, 0.05, "exact", kl=kl), MASK)
    weights = GroupNormalized().weights(SampledReturns(returns, returns, MASK, scores, 3))
    torch.testing.assert_close(
        weights, torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0], dtype=torch.float64), rtol=1e-3, atol=0
    )
    assert LeaveOneOut().weights(SampledReturns(returns, returns, MASK, scores, 3)) is None


def test_a_row_that_has_ended_is_held_at_its_final_return() -> None:
    logratio = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = token_rewards(SCORES, MASK, 0.5, "k1_sequence", logratio=logratio)
    returns, final = returns_to_go(rewards, MASK), final_return(SCORES, MASK, 0.5, "k1_sequence", logratio)
    torch.testing.assert_close(final, SCORES - 0.5 * torch.where(MASK, logratio, 0.0).sum(1))
    torch.testing.assert_close(returns, torch.where(MASK, final[:, None], 0.0))  # the same for every action
    advantages = LeaveOneOut()(SampledReturns(rewards, returns, MASK, SCORES, 3, final=final))
    others = (final.view(2, 3).sum(1, keepdim=True) - final.view(2, 3)) / 2
    torch.testing.assert_close(advantages, torch.where(MASK, (final - others.flatten())[:, None], 0.0))


@pytest.mark.parametrize("advantage", [LeaveOneOut(), GroupNormalized()])
def test_a_group_of_one_is_refused(advantage) -> None:
    with pytest.raises(ConfigError, match=r"with 1 sample per prompt.*use at least 2"):
        compute(advantage, torch.zeros(6, 3), MASK, SCORES, 1)
    with pytest.raises(ValueError, match="6 rows are not a whole number of groups of 4"):
        compute(advantage, torch.zeros(6, 3), MASK, SCORES, 4)
