import pytest
import torch

from alignpro.objectives import AdaptiveKL, KLPenalty, exact_kl_coef, kl_loss_terms, token_rewards

MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
SCORES = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
KL = torch.tensor([[0.1, 0.2, 0.4], [0.8, 9.0, 9.0], [1.6, 3.2, 9.0]], dtype=torch.float64)


def test_exact_kl_of_a_state_is_charged_to_the_action_before_it() -> None:
    rewards = token_rewards(SCORES, MASK, 10.0, "exact", kl=KL)
    expected = torch.tensor([[-2.0, -4.0, 1.0], [2.0, 0.0, 0.0], [-32.0, 3.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(rewards, expected)


def test_k1_is_charged_to_the_action_itself() -> None:
    rewards = token_rewards(SCORES, MASK, 10.0, "k1", logratio=-KL)
    expected = torch.tensor([[1.0, 2.0, 5.0], [10.0, 0.0, 0.0], [16.0, 35.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(rewards, expected)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_do_not_change_the_reward(estimator: str) -> None:
    rewards = token_rewards(SCORES, MASK, 10.0, estimator)
    assert rewards.sum(1).tolist() == [1.0, 2.0, 3.0]
    assert (rewards != 0).sum() == 3


def test_regressed_lies_between_exact_and_the_log_ratio_of_the_whole_sequence() -> None:
    def rewards(estimator: str, share: float = 0.0) -> torch.Tensor:
        return token_rewards(SCORES, MASK, 10.0, estimator, KL, -KL, share)

    sequence = torch.tensor([[0.0, 0.0, 8.0], [10.0, 0.0, 0.0], [0.0, 51.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(rewards("k1_sequence"), sequence)
    torch.testing.assert_close(rewards("regressed", 0.25), 0.75 * rewards("exact") + 0.25 * sequence)
    assert exact_kl_coef("regressed", 10.0, 0.25) == 7.5
    terms = kl_loss_terms("regressed", 10.0, kl=KL[0], sampled_share=0.25)
    torch.testing.assert_close(terms.kappa, torch.full((3,), 7.5, dtype=torch.float64))
    assert kl_loss_terms("regressed", 10.0, sampled_share=1.0) == (None, None, None)  # no reference is needed
    with pytest.raises(ValueError, match="'k1_sequence' needs logratio"):
        token_rewards(SCORES, MASK, 1.0, "k1_sequence", KL)


def test_the_sampled_share_is_a_regression_over_earlier_steps() -> None:
    penalty = KLPenalty("regressed", AdaptiveKL(0.5), decay=0.5)
    assert penalty.sampled_share == 0  # nothing is known yet
    # R = 0.5 L exactly, and λ = 0.5: the log-ratio explains the scores.
    penalty.update(1.0, 4, covariance=0.5 * 8.0, variance=8.0)
    assert penalty.sampled_share == pytest.approx(1.0, rel=1e-3)
    penalty.update(1.0, 4, covariance=0.0, variance=8.0)  # of which nothing is explained
    assert penalty.sampled_share == pytest.approx(0.5 / 1.5, rel=1e-3)
    penalty.update(1.0, 4, covariance=-100.0, variance=8.0)
    assert penalty.sampled_share == 0  # never outside [0, 1]
    assert penalty.metrics() == {"kl_coef": 0.5, "kl_sampled_share": 0.0}
    assert KLPenalty("exact", AdaptiveKL(0.5)).metrics() == {"kl_coef": 0.5}
    rounding = KLPenalty("regressed", AdaptiveKL(0.5))
    rounding.update(0.0, 100, covariance=0.5e-9, variance=1e-9)  # of log-ratios that are equal but for rounding
    assert rounding.sampled_share < 1e-6


def test_the_penaltys_state_is_restored_also_without_what_older_runs_did_not_save() -> None:
    penalty = KLPenalty("regressed", AdaptiveKL(0.1, target=6.0, horizon=1000))
    penalty.update(6.6, 100, covariance=3.0, variance=40.0)
    restored = KLPenalty("regressed", AdaptiveKL(9.9, target=6.0, horizon=1000))
    restored.load_state_dict(penalty.state_dict())
    assert (restored.coef, restored.sampled_share) == (penalty.coef, penalty.sampled_share)
    for each in (penalty, restored):
        each.update(3.0, 10, covariance=1.0, variance=10.0)
    assert (restored.coef, restored.sampled_share) == (penalty.coef, penalty.sampled_share)
    restored.load_state_dict({"coef": 0.2})
    assert (restored.coef, restored.sampled_share) == (0.2, 0.0)


def test_values_beyond_the_end_do_not_matter_even_nan() -> None:
    kl = KL.masked_fill(~MASK, float("nan"))
    torch.testing.assert_close(
        token_rewards(SCORES, MASK, 1.0, "exact", kl=kl), token_rewards(SCORES, MASK, 1.0, "exact", kl=KL)
    )
    assert torch.isfinite(token_rewards(SCORES, MASK, 1.0, "k1", logratio=kl)).all()


def test_a_row_without_actions_earns_nothing() -> None:
    mask = torch.tensor([[True, True], [False, False]])
    rewards = token_rewards(torch.tensor([1.0, 5.0]), mask, 1.0, "exact", kl=torch.ones(2, 2))
    assert rewards.tolist() == [[-1.0, 1.0], [0.0, 0.0]]
    empty = torch.zeros(2, 0, dtype=torch.bool)
    assert token_rewards(torch.ones(2), empty, 1.0, "exact", kl=torch.zeros(2, 0)).shape == (2, 0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_alpha_is_the_derivative_of_the_sampled_estimate(estimator: str) -> None:
    logratio = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    terms = kl_loss_terms(estimator, 0.3, logratio=logratio)
    (derivative,) = torch.autograd.grad(terms.loss.sum(), logratio)
    torch.testing.assert_close(terms.alpha, derivative)
    assert terms.kappa is None and (terms.loss >= 0).all() and terms.loss[4] == 0


def test_kappa_is_lambda_for_exact_kl_and_absent_for_k1() -> None:
    terms = kl_loss_terms("exact", 0.3, kl=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(terms.loss, torch.tensor([0.3, 0.6]))
    torch.testing.assert_close(terms.kappa, torch.tensor([0.3, 0.3]))
    assert terms.alpha is None
    assert kl_loss_terms("k1", 0.3) == (None, None, None)
    assert kl_loss_terms("exact", 0.0) == (None, None, None)  # no reference is needed when KL costs nothing


def test_missing_or_misshapen_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="'exact' needs kl of shape"):
        token_rewards(SCORES, MASK, 1.0, "exact")
    with pytest.raises(ValueError, match="'k1' needs logratio"):
        token_rewards(SCORES, MASK, 1.0, "k1", logratio=KL[:1])
    with pytest.raises(ValueError, match="not left-aligned"):
        token_rewards(SCORES, MASK.flip(1), 1.0, "k2")
    with pytest.raises(ValueError, match="scores has shape"):
        token_rewards(SCORES[:2], MASK, 1.0, "k2")
    with pytest.raises(ValueError, match="'exact' needs the exact KL"):
        kl_loss_terms("exact", 0.1)
    with pytest.raises(ValueError, match="'k3' needs logratio"):
        kl_loss_terms("k3", 0.1)


def test_adaptive_coefficient_follows_ziegler() -> None:
    controller = AdaptiveKL(0.1, target=6.0, horizon=1000)
    assert controller.update(6.6, 100) == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    assert controller.update(600.0, 100) == pytest.approx(0.101 * (1 + 0.2 * 0.1))  # the error is clipped to 0.2
    before = controller.coef
    assert controller.update(0.0, 100) == pytest.approx(before * (1 - 0.2 * 0.1))


def test_a_fixed_coefficient_stays_and_an_adaptive_one_stays_positive() -> None:
    fixed = AdaptiveKL(0.1)
    assert fixed.update(100.0, 1_000_000) == 0.1
    tiny_horizon = AdaptiveKL(0.1, target=1.0, horizon=1)
    for _ in range(100):
        tiny_horizon.update(0.0, 1000)
    assert tiny_horizon.coef > 0
