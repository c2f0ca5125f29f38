"""Seeds and filters: the inputs that determine a draw, and the distribution that it is drawn from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from alignpro.engine import SamplingParams, derive_seed
from alignpro.engine.sampler import filter_logits, position_seeds, sample, seed_state
from alignpro.errors import ConfigError
from alignpro.models.head import Head


def _probabilities(logits: list[float] | torch.Tensor, **settings) -> list[float]:
    """Return the distribution after the filters."""
    row = torch.as_tensor(logits, dtype=torch.float64)[None]
    return filter_logits(row, SamplingParams(**settings)).softmax(-1)[0].tolist()


class TestDeriveSeed:
    def test_every_part_and_its_place_count(self) -> None:
        parts = [
            (),
            (0,),
            (1,),
            (-1,),
            (0, 0),
            (0, 1),
            (1, 0),
            ("a",),
            ("b",),
            ("a", 1),
            (1, "a"),
            (97,),
            (2**64,),
            (2**70,),
        ]
        assert len({derive_seed(*given) for given in parts}) == len(parts)

    def test_long_names_count_in_full(self) -> None:
        assert derive_seed("evaluation-one") != derive_seed("evaluation-two")

    @given(st.lists(st.integers() | st.text("abc", max_size=20), max_size=4))
    def test_fits_in_int64_and_is_not_negative(self, parts: list[int | str]) -> None:
        assert 0 <= derive_seed(*parts) < 2**63

    def test_of_neighbours_is_uniform(self) -> None:
        low_bytes = torch.tensor([derive_seed(0, i) % 256 for i in range(25600)]).bincount(minlength=256)
        assert chisquare(low_bytes.tolist()).pvalue > 1e-3

    @given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
    @settings(max_examples=50)
    def test_of_all_positions_at_once_is_the_same(self, seeds: list[int]) -> None:
        positions = [0, 1, 2, 255, 100_000]
        states = np.array([[seed_state(seed)] for seed in seeds], np.uint64)
        derived = position_seeds(states, np.array(positions))
        assert derived.tolist() == [[derive_seed(seed, position) for position in positions] for seed in seeds]


class TestFilters:
    @pytest.mark.parametrize(
        ("top_k", "top_p", "min_p"),
        [
            each
            for each in itertools.product((0, 1, 5, 1000), (1.0, 0.9, 0.3), (0.0, 0.05, 0.9))
            if each != (0, 1.0, 0.0)
        ],
    )
    def test_keep_the_same_tokens_as_those_of_transformers(self, top_k: int, top_p: float, min_p: float) -> None:
        logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
        expected = logits
        if top_k:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        if min_p:
            expected = MinPLogitsWarper(min_p)(None, expected)
        assert torch.equal(filter_logits(logits, SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)), expected)

    def test_off_leave_everything(self) -> None:
        logits = torch.randn(3, 10)
        assert torch.equal(filter_logits(logits, SamplingParams()), logits)

    def test_top_k_keeps_all_that_tie_with_the_last(self) -> None:
        assert _probabilities([2.0, 1.0, 1.0, 0.0], top_k=2)[3] == 0
        assert _probabilities([2.0, 1.0, 1.0, 0.0], top_k=2)[1:3] == pytest.approx([0.21194, 0.21194], abs=1e-5)

    def test_top_p_stops_as_soon_as_the_mass_suffices(self) -> None:
        halves = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
        assert _probabilities(halves, top_p=0.5) == [1, 0, 0, 0]
        assert _probabilities(halves, top_p=0.51) == pytest.approx([2 / 3, 1 / 3, 0, 0])
        assert _probabilities(halves, top_p=0.75) == pytest.approx([2 / 3, 1 / 3, 0, 0])

    def test_top_p_takes_the_lowest_ids_of_equals(self) -> None:
        assert _probabilities([0.0] * 100, top_p=0.03) == pytest.approx([1 / 3] * 3 + [0] * 97)

    @pytest.mark.parametrize("settings", [{"top_p": 1e-9}, {"min_p": 0.999}, {"top_k": 1}])
    def test_the_likeliest_always_stays(self, settings: dict[str, float]) -> None:
        assert _probabilities([0.0, 3.0, 1.0], **settings) == [0, 1, 0]

    def test_min_p_is_relative_to_the_likeliest(self) -> None:
        logits = torch.tensor([0.5, 0.3, 0.2]).log()
        assert _probabilities(logits, min_p=0.5) == pytest.approx([0.625, 0.375, 0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.0),
        ("n", 0),
    ],
)
def test_a_parameter_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"sampling: {name}="):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 2.5),
        ("top_k", "5"),
        ("n", 1.5),
        ("seed", 0.5),
        ("top_logprobs", 1.5),
        ("stop", "\n"),  # three letters would be three stop texts
        ("stop", 7),
        ("stop_token_ids", 7),
        ("stop_token_ids", ("a",)),
    ],
)
def test_a_parameter_of_another_type_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"sampling: {name}=.*: expected (an integer|a sequence)"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_numpy_and_lists_are_kept_as_plain_values() -> None:
    found = SamplingParams(max_tokens=np.int64(3), n=torch.tensor(2), stop_token_ids=np.arange(2), stop=["a"])  # type: ignore[arg-type]
    assert found == SamplingParams(max_tokens=3, n=2, stop_token_ids=(0, 1), stop=("a",))
    assert {type(each) for each in (found.max_tokens, found.n, *found.stop_token_ids)} == {int}
    hash(found)


class TestSample:
    HEAD = Head(torch.randn(30, 8, generator=torch.Generator().manual_seed(1)), None, None)
    HIDDEN = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))

    def draw(self, count: int, head: Head, **settings) -> tuple[torch.Tensor, torch.Tensor]:
        seeds = torch.tensor([derive_seed(5, i) for i in range(count)])
        return sample(self.HIDDEN.expand(count, -1), head, SamplingParams(**settings), seeds)

    @pytest.mark.parametrize(
        "settings",
        [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.1}, {"top_k": 6, "top_p": 0.9, "temperature": 2.0}],
        ids=str,
    )
    @pytest.mark.parametrize(
        "head",
        [HEAD, Head(HEAD.weight, torch.linspace(-1, 1, 30), 2.0)],
        ids=["plain", "bias and soft cap"],
    )
    def test_draws_from_the_distribution_that_it_reports(self, head: Head, settings: dict[str, float]) -> None:
        logits = self.HIDDEN @ head.weight.T
        if head.bias is not None and head.softcap is not None:
            logits = head.softcap * torch.tanh((logits + head.bias) / head.softcap)
        params = SamplingParams(**settings)
        probability = filter_logits(logits.double() / params.temperature, params).softmax(-1)[0]
        count = 4000
        token, logprob = self.draw(count, head, **settings)
        assert torch.allclose(logprob.double(), probability.log()[token], atol=1e-5)
        drawn = token.bincount(minlength=30)
        assert drawn[probability == 0].sum() == 0
        common = count * probability > 10
        observed, expected = drawn[common].tolist(), (count * probability[common]).tolist()
        if len(common) > common.sum() and (rare := count - sum(expected)) > 1e-6:
            observed.append(drawn[~common].sum().item())
            expected.append(rare)
        assert chisquare(observed, expected).pvalue > 1e-3

    def test_greedy_ignores_filters_and_is_certain(self) -> None:
        token, logprob = self.draw(5, self.HEAD, temperature=0.0, top_k=3, top_p=0.5)
        assert token.tolist() == [(self.HIDDEN @ self.HEAD.weight.T).argmax().item()] * 5
        assert logprob.tolist() == [0.0] * 5

    def test_statistics_of_half_precision_are_not_rounded_to_it(self) -> None:
        half = Head(self.HEAD.weight.bfloat16(), None, None)
        hidden = 8 * self.HIDDEN.bfloat16()
        _, logprob = sample(hidden, half, SamplingParams(top_k=29), torch.tensor([0]))
        exact = filter_logits(hidden.double() @ half.weight.double().T, SamplingParams(top_k=29)).log_softmax(-1)
        assert (exact - logprob.double()).abs().min() < 1e-5
