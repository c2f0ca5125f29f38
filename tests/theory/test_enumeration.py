import pytest
import torch

from alignpro.theory import enumerate_sequences, exact_gradient, exact_objective, expected_gradient, groups, state_kl


def test_all_ended_and_truncated_sequences_are_enumerated() -> None:
    space = enumerate_sequences(vocabulary=3, end_token=1, max_length=2)
    # Ended at once, ended after one token, truncated at two tokens.
    assert sorted(space.sequences) == [[0, 0], [0, 1], [0, 2], [1], [2, 0], [2, 1], [2, 2]]
    assert space.prefixes == ((), (0,), (2,))
    for tokens, states in zip(space.sequences, space.state, strict=True):
        assert [space.prefixes[s] for s in states[: len(tokens)]] == [tuple(tokens[:t]) for t in range(len(tokens))]


@pytest.mark.parametrize(("vocabulary", "max_length"), [(2, 5), (3, 3), (4, 3)])
def test_probabilities_sum_to_one_for_any_policy(vocabulary: int, max_length: int) -> None:
    space = enumerate_sequences(vocabulary, 0, max_length)
    assert len(space.sequences) == sum((vocabulary - 1) ** t for t in range(max_length + 1))
    policy = torch.randn(len(space.prefixes), vocabulary, dtype=torch.float64).log_softmax(-1)
    assert space.sequence_logprob(policy).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_sequence_kl_is_the_expected_sum_over_states() -> None:
    space = enumerate_sequences(3, 0, 3)
    p, q = (torch.randn(len(space.prefixes), 3, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    logprob, reference = space.sequence_logprob(p), space.sequence_logprob(q)
    by_states = torch.where(space.mask, state_kl(p, q)[space.state], 0.0).sum(-1)  # (S,)
    zero = torch.zeros_like(logprob)
    assert exact_objective(logprob, reference, zero, 1.0).item() == pytest.approx(
        -(logprob.exp() * by_states).sum().item(), abs=1e-12
    )


def test_gradient_agrees_with_finite_differences() -> None:
    space = enumerate_sequences(3, 0, 2)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(len(space.prefixes), 3, generator=g, dtype=torch.float64, requires_grad=True)
    reference = space.sequence_logprob(torch.randn(3, 3, generator=g, dtype=torch.float64).log_softmax(-1))
    scores = torch.randn(len(space.tokens), generator=g, dtype=torch.float64)

    def value(logits: torch.Tensor) -> torch.Tensor:
        return exact_objective(space.sequence_logprob(logits.log_softmax(-1)), reference, scores, 0.3)

    assert torch.autograd.gradcheck(value, logits)
    unused = torch.zeros(2, requires_grad=True)
    gradient, nothing = exact_gradient(value(logits), [logits, unused])
    assert gradient.abs().max() > 0 and (nothing == 0).all()


def test_groups_cover_all_ordered_pairs_with_their_probability() -> None:
    logprob = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    pairs = dict(groups(logprob, 2))
    assert len(pairs) == 9 and sum(pairs.values()) == pytest.approx(1.0)
    assert pairs[(0, 2)] == pytest.approx(0.1) and pairs[(1, 1)] == pytest.approx(0.09)
    (mean,) = expected_gradient(logprob, 2, lambda rows: [rows.double()])
    torch.testing.assert_close(mean, torch.full((2,), 0.3 + 2 * 0.5, dtype=torch.float64))


def test_missing_sequences_and_bad_spaces_are_refused() -> None:
    space = enumerate_sequences(3, 0, 2)
    logprob = space.sequence_logprob(torch.zeros(3, 3, dtype=torch.float64).log_softmax(-1))
    with pytest.raises(ValueError, match=r"sum to 0\.77"):
        exact_objective(logprob[:-2], logprob[:-2], logprob[:-2], 0.1)
    with pytest.raises(ValueError, match="end token 3"):
        enumerate_sequences(3, 3, 2)
    with pytest.raises(ValueError, match="too many"):
        enumerate_sequences(100, 0, 4)
