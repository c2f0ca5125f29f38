import pytest
import torch

from alignpro.objectives import (
    PolicyGradient,
    PolicyGradientBatch,
    PPOClip,
    loss_count,
    value_loss,
)

N = 8


def make_batch(estimator: str = "exact", **changes) -> PolicyGradientBatch:
    g = torch.Generator().manual_seed(0)

    def randn() -> torch.Tensor:
        return torch.randn(N, generator=g, dtype=torch.float64)

    fields = {
        "advantages": randn(),
        "scale": 0.25,
        "kl_coef": 0.3,
        "kl_estimator": estimator,
        "reference_logprob": randn() - 2,
        "old_logprob": randn() * 0.3 - 2,
        "entropy_coef": 0.1,
    }
    return PolicyGradientBatch(**(fields | changes))


def make_statistics() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    values = [torch.rand(N, generator=g, dtype=torch.float64) for _ in range(3)]
    values[0] = values[0] * 0.6 - 2.3
    return [value.requires_grad_() for value in values]


@pytest.mark.parametrize("loss", ["policy_gradient", "ppo_clip"])
@pytest.mark.parametrize("estimator", ["exact", "k1", "k2", "k3"])
def test_coefficients_are_the_derivatives_of_the_loss(loss: str, estimator: str) -> None:
    batch = make_batch(estimator)
    kind = PolicyGradient() if loss == "policy_gradient" else PPOClip(0.2)
    statistics = make_statistics()
    terms, *coefficients = kind.coefficients(batch)(*statistics, torch.arange(N))
    truth = torch.autograd.grad(terms.sum(), statistics, allow_unused=True)
    for ours, expected in zip(coefficients, truth, strict=True):
        if ours is None:
            assert expected is None
        else:
            torch.testing.assert_close(ours.detach(), expected)


def test_chunks_add_up_to_the_whole() -> None:
    batch, statistics = make_batch("k3"), [s.detach() for s in make_statistics()]
    whole, parts = PPOClip(0.2).coefficients(batch), PPOClip(0.2).coefficients(batch)
    expected = whole(*statistics, torch.arange(N))
    pieces = [
        parts(*[s[rows] for s in statistics], rows) for rows in (torch.tensor([5, 1, 7]), torch.tensor([0, 2, 3, 4, 6]))
    ]
    order = torch.tensor([5, 1, 7, 0, 2, 3, 4, 6])
    for index in (0, 1, 2):
        torch.testing.assert_close(torch.cat([piece[index] for piece in pieces]), expected[index][order])
    assert parts.metrics() == pytest.approx(whole.metrics())


def test_ppo_at_the_old_policy_is_the_policy_gradient() -> None:
    logprob, entropy, kl = (s.detach() for s in make_statistics())
    batch = make_batch(old_logprob=logprob)
    clipped = PPOClip(0.2).coefficients(batch)
    ours = clipped(logprob, entropy, kl, torch.arange(N))
    plain = PolicyGradient().coefficients(batch)(logprob, entropy, kl, torch.arange(N))
    for left, right in zip(ours[1:], plain[1:], strict=True):
        torch.testing.assert_close(left, right)
    assert clipped.metrics() == {"clip_fraction": 0.0, "old_policy_kl": 0.0}


def test_ppo_clips_only_ratios_beyond_the_range_in_the_advantages_direction() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    batch = PolicyGradientBatch(advantages, 1.0, old_logprob=torch.zeros(6, dtype=torch.float64))
    coefficients = PPOClip(0.2).coefficients(batch)
    terms, alpha, eta, kappa = coefficients(ratio.log(), None, None, torch.arange(6))
    torch.testing.assert_close(alpha, torch.tensor([0.0, 1.5, -0.5, 0.0, -1.1, 0.9], dtype=torch.float64))
    torch.testing.assert_close(terms, -torch.tensor([1.2, -1.5, 0.5, -0.8, 1.1, -0.9], dtype=torch.float64))
    assert eta is None and kappa is None
    assert coefficients.metrics()["clip_fraction"] == pytest.approx(2 / 6)
    assert coefficients.metrics()["old_policy_kl"] == pytest.approx((ratio - 1 - ratio.log()).mean().item())


def test_missing_inputs_are_named() -> None:
    with pytest.raises(ValueError, match="old_logprob"):
        PPOClip(0.2).coefficients(make_batch(old_logprob=None))
    logprob = torch.zeros(N)
    with pytest.raises(ValueError, match="entropy=True"):
        PolicyGradient().coefficients(make_batch())(logprob, None, logprob, torch.arange(N))
    with pytest.raises(ValueError, match="reference_logprob"):
        PolicyGradient().coefficients(make_batch("k3", reference_logprob=None))(logprob, logprob, None, torch.arange(N))


def test_scale_and_value_loss() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert loss_count(mask, "sequence") == 2
    assert loss_count(mask, "token") == 4
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, float("nan"), 0.0]], requires_grad=True)
    loss = value_loss(values, torch.zeros(2, 3), mask, 0.5)
    assert loss.item() == pytest.approx(0.25 * (1 + 4 + 9 + 16))
    (gradient,) = torch.autograd.grad(loss, values)
    assert gradient.tolist() == [[0.5, 1.0, 1.5], [2.0, 0.0, 0.0]]
