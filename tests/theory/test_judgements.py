"""Planted judges are diagnosed rightly, and what they say of two arms is told apart from their habits."""

import math

import numpy as np
import pytest
import scipy.stats

from alignpro.theory.statistics import (
    Clusters,
    JudgedPairs,
    cohen_kappa,
    judgement_statistics,
    length_controlled,
    outcomes,
)

RUNS, PAIRS = 100, 200
CLUSTERS = Clusters(np.repeat(range(PAIRS // 2), 2).tolist())
PLANTED = {"always A": "position", "random": "chance", "prefers longer": "length", "right": "usable"}


def planted(judge: str, draw: np.random.Generator, better: float = 0.7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verdicts (RUNS, PAIRS) in both orders, and lengths; the right judge errs in a tenth of its verdicts."""
    size = (RUNS, PAIRS)
    longer = draw.normal(20, 50, size).round()
    if judge == "always A":
        return np.ones(size), np.zeros(size), longer
    if judge == "random":
        return *(draw.integers(0, 2, size).astype(float) for _ in range(2)), longer
    if judge == "prefers longer":
        verdict = (1 + np.sign(longer)) / 2
        return verdict, verdict.copy(), longer
    truth = (draw.random(size) < better).astype(float)
    first, second = (np.where(draw.random(size) < 0.1, 1 - truth, truth) for _ in range(2))
    return first, second, longer


def judged(first, second, longer=None, clusters=None, errors=0) -> JudgedPairs:
    first, second = np.asarray(first, float), np.asarray(second, float)
    longer = np.zeros(len(first)) if longer is None else np.asarray(longer, float)
    return JudgedPairs(first, second, longer, clusters or Clusters.single(len(first)), errors)


@pytest.mark.parametrize("judge", PLANTED)
def test_planted_judges_are_diagnosed_rightly_in_every_run(judge):
    verdicts = planted(judge, np.random.default_rng(7))
    found = [judgement_statistics(judged(*run, CLUSTERS)) for run in zip(*verdicts, strict=True)]
    assert [each.diagnosis for each in found] == [PLANTED[judge]] * RUNS
    assert all(bool(each.reason) == (judge != "right") for each in found)
    if judge == "right":
        rate = 0.9 * 0.7 + 0.1 * 0.3
        inside = [each.win_rate.low < rate < each.win_rate.high for each in found]
        controlled = [each.length_controlled.rate for each in found]
        assert sum(inside) >= 90
        assert sum(each.low < rate < each.high for each in controlled) >= 90


def test_a_right_judge_of_very_unequal_arms_is_not_taken_for_one_that_guesses():
    first, second, longer = planted("right", np.random.default_rng(1), better=1.0)
    found = judgement_statistics(judged(first[0], second[0], longer[0], CLUSTERS))
    assert found.diagnosis == "usable"
    assert found.chance == pytest.approx(0.5, abs=0.01)
    assert found.win_rate.low > 0.8
    assert found.win_rate.p_value < 1e-6


@pytest.mark.parametrize("ties", [0.5, 0.7, 0.9])
@pytest.mark.parametrize(("decides", "least", "most"), [("always A", 0, 0), ("random", 0, 10), ("right", 75, 100)])
def test_ties_that_agree_do_not_speak_for_what_a_judge_decides(ties, decides, least, most):
    """A judge may say tie by a rule, such as of two responses that it cannot read, and go by place wherever it decides."""
    draw = np.random.default_rng(3)
    first, second, longer = planted(decides, draw)
    tied = draw.random(first.shape) < ties
    verdicts = np.where(tied, 0.5, first), np.where(tied, 0.5, second), longer
    found = [judgement_statistics(judged(*run, CLUSTERS)).diagnosis for run in zip(*verdicts, strict=True)]
    assert least <= found.count("usable") <= most


def test_ties_and_disagreements_and_errors_are_kept_apart():
    found = judgement_statistics(judged([1, 0, 0.5, 1, 0.5, 1], [1, 0, 0.5, 0, 1, 1], errors=2))
    assert (found.wins, found.losses, found.ties, found.disagreements, found.errors) == (2, 1, 1, 2, 2)
    assert found.win_rate.value == pytest.approx((1 + 0 + 0.5 + 0.5 + 0.75 + 1) / 6)
    assert found.consistency.value == pytest.approx(4 / 6)
    assert found.decided_consistency == pytest.approx(3 / 4)
    assert found.first_preferred.value == pytest.approx((0.5 * 4 + 1 + 0.25) / 6)


@pytest.mark.parametrize(
    ("first", "second", "errors", "diagnosis", "says"),
    [
        ([1] * 4, [1] * 4, 0, "too few", "too few pairs"),
        ([0.5] * 50, [0.5] * 50, 0, "ties", "neither response is better"),
        ([1] * 40, [1] * 40, 41, "unreadable", "41 of 81 pairs"),
        ([], [], 5, "unreadable", "none of 5 pairs"),
        ([0] * 50, [1] * 50, 0, "position", "comes second, in 100% of its verdicts"),
        ([0.5] * 90 + [1] * 3, [0.5] * 90 + [1] * 3, 0, "too few", "of the 3 pairs of which neither order says tie"),
    ],
)
def test_what_is_no_judgement_says_why(first, second, errors, diagnosis, says):
    found = judgement_statistics(judged(first, second, errors=errors))
    assert found.diagnosis == diagnosis
    assert says in found.reason == found.as_dict()["no_judgement"]


def test_a_judge_that_always_wins_has_a_rate_with_an_interval_and_a_test():
    found = judgement_statistics(judged([1] * 50, [1] * 50, longer=np.resize([3, -3], 50)))
    assert found.diagnosis == "usable"
    assert found.win_rate.low > 0.9
    assert found.win_rate.p_value == 0.5**49
    assert 0.9 < found.length_controlled.rate.value < 1


@pytest.mark.parametrize(
    "clusters", [Clusters.single(20), Clusters(np.repeat(range(10), 2).tolist())], ids=["single", "two"]
)
def test_more_wins_are_never_worse_evidence_and_the_test_agrees_with_the_interval(clusters):
    rates = []
    for wins in range(10, 21):
        verdicts = np.arange(20) < wins
        rates.append(judgement_statistics(judged(verdicts, verdicts, clusters=clusters)).win_rate)
    assert all((each.p_value < 0.05) == (each.low > 0.5) for each in rates)
    p_values = [each.p_value for each in rates]
    if clusters.independent:
        assert p_values == sorted(p_values, reverse=True)
        assert p_values == pytest.approx([scipy.stats.binomtest(wins, 20).pvalue for wins in range(10, 21)])


def test_pairs_of_one_prompt_are_not_independent():
    first = np.repeat(np.random.default_rng(0).integers(0, 2, 40), 5)
    together = judgement_statistics(judged(first, first, clusters=Clusters(np.repeat(range(40), 5).tolist())))
    apart = judgement_statistics(judged(first, first))
    width = [each.win_rate.high - each.win_rate.low for each in (together, apart)]
    assert 1.8 < width[0] / width[1] < 2.7  # √5 = 2.2


def test_verdicts_have_three_values_and_one_of_each_pair():
    with pytest.raises(ValueError, match="a verdict is 1, 0 or"):
        judgement_statistics(judged([0.7], [0.5]))
    with pytest.raises(ValueError, match="of the same pairs"):
        judgement_statistics(judged([1, 1], [1, 1], longer=[0.0]))


class TestLengthControl:
    def test_the_rate_at_equal_lengths_is_that_of_the_model_that_made_the_verdicts(self):
        """θ = 0.4, β = 1.5, lengths that favour ours: the raw rate is far above σ(0.4), the controlled one is not."""
        draw = np.random.default_rng(0)
        longer = draw.normal(60, 60, (100, 300))
        scale = np.sqrt((longer**2).mean(1, keepdims=True))
        odds = 0.4 + 1.5 * np.tanh(longer / scale)
        preferred = (draw.random(longer.shape) < 1 / (1 + np.exp(-odds))).astype(float)
        truth, clusters = 1 / (1 + math.exp(-0.4)), Clusters.single(300)
        found = [length_controlled(y, d, clusters) for y, d in zip(preferred, longer, strict=True)]
        assert preferred.mean() > truth + 0.1
        assert np.mean([each.rate.value for each in found]) == pytest.approx(truth, abs=0.015)
        assert np.mean([each.slope for each in found]) == pytest.approx(1.5, abs=0.1)
        assert 0.89 <= np.mean([each.rate.low < truth < each.rate.high for each in found]) <= 0.99

    def test_a_judge_that_measures_length_has_no_preference_at_equal_lengths(self):
        longer = np.random.default_rng(1).normal(30, 50, 400)
        found = length_controlled((longer > 0).astype(float), longer, Clusters.single(400))
        assert (longer > 0).mean() > 0.7
        assert found.rate.value == pytest.approx(0.5, abs=0.1)
        assert found.slope > 5

    def test_equal_lengths_leave_the_raw_rate(self):
        found = length_controlled(np.array([1.0, 0.0, 1.0, 1.0]), np.zeros(4), Clusters.single(4))
        assert found.rate.value == 0.75
        assert "no pair differs in length" in found.rate.not_estimable

    def test_a_length_that_all_pairs_share_cannot_be_told_from_the_rate(self):
        for length in (9.0, -9.0):
            found = length_controlled(np.resize([1.0, 1.0, 0.0], 60), np.full(60, length), Clusters.single(60))
            assert math.isnan(found.rate.value) and math.isnan(found.slope)
            assert found.rate.not_estimable.startswith("all pairs differ by the same length")
            assert found.rate.p_value is None

    def test_what_is_always_tied_has_no_interval(self):
        found = length_controlled(np.full(30, 0.5), np.arange(30.0), Clusters.single(30))
        assert found.rate.value == 0.5
        assert "do not vary" in found.rate.not_estimable

    @pytest.mark.parametrize("truth", [0.95, 0.98])
    def test_its_interval_covers_where_nearly_all_pairs_are_won(self, truth):
        draw = np.random.default_rng(4)
        won = (draw.random((100, 30)) < truth).astype(float)
        longer = draw.normal(0, 80, won.shape)
        rates = [length_controlled(y, d, Clusters.single(30)).rate for y, d in zip(won, longer, strict=True)]
        assert np.mean([each.low < truth < each.high for each in rates]) >= 0.92

    def test_its_interval_covers_where_most_pairs_are_won_and_those_of_a_prompt_are_alike(self):
        draw = np.random.default_rng(4)
        clusters = Clusters(np.repeat(range(40), 4).tolist())
        shares = np.repeat(draw.beta(2, 0.5, (100, 40)), 4, axis=1)  # of mean 0.8
        won, longer = (draw.random(shares.shape) < shares).astype(float), draw.normal(0, 80, shares.shape)
        together, apart = (
            [length_controlled(y, d, of).rate for y, d in zip(won, longer, strict=True)]
            for of in (clusters, Clusters.single(160))
        )
        assert 0.9 <= np.mean([each.low < 0.8 < each.high for each in together]) <= 0.99
        assert np.mean([each.low < 0.8 < each.high for each in apart]) < 0.9

    def test_thirty_wins_of_thirty_say_no_more_at_equal_lengths_than_without(self):
        longer = np.random.default_rng(0).normal(0, 80, 30)
        found = length_controlled(np.ones(30), longer, Clusters.single(30)).rate
        raw = judgement_statistics(judged([1] * 30, [1] * 30, longer)).win_rate
        assert found.high - found.low > raw.high - raw.low
        assert 1e-9 < found.p_value < 1e-3
        alike = length_controlled(np.ones(30), longer, Clusters(np.repeat(range(6), 5).tolist())).rate
        assert alike.low < found.low, "six prompts with five pairs each that are all won say less than thirty"

    def test_ties_make_a_rate_of_one_half_more_certain_than_wins_and_losses(self):
        longer = np.random.default_rng(0).normal(0, 80, 60)
        decided, tied = (
            length_controlled(np.resize(outcome, 60), longer, Clusters.single(60)).rate
            for outcome in ([1.0, 0.0], [1.0, 0.0, 0.5, 0.5, 0.5, 0.5])
        )
        assert tied.high - tied.low == pytest.approx((decided.high - decided.low) / math.sqrt(3), rel=0.05)

    def test_an_interval_excludes_one_half_if_and_only_if_the_p_value_is_small(self):
        draw = np.random.default_rng(6)
        for _ in range(40):
            size = int(draw.integers(4, 40))
            y, d = draw.choice([0.0, 0.5, 1.0, 1.0], size), draw.normal(20, 80, size).round()
            found = length_controlled(y, d, Clusters(draw.integers(0, 12, size).tolist())).rate
            if found.not_estimable is None:
                assert (found.p_value < 0.05) == (not found.low <= 0.5 <= found.high)

    def test_lengths_that_hardly_differ_leave_nearly_any_rate(self):
        """The rate at equal lengths is far from all that was seen: the fit may be anywhere, the interval says so."""
        draw = np.random.default_rng(5)
        for _ in range(10):
            found = length_controlled(
                draw.integers(0, 2, 30) * 1.0, draw.normal(500, 5, 30).round(), Clusters.single(30)
            )
            assert found.rate.low <= found.rate.value <= found.rate.high
            assert found.rate.high - found.rate.low > 0.99


class TestKappa:
    def test_it_is_that_of_the_definition(self):
        a, b = np.repeat([1, 1, 0, 0], [20, 5, 10, 15]), np.repeat([1, 0, 1, 0], [20, 5, 10, 15])
        assert cohen_kappa(a, b, Clusters.single(50)).value == pytest.approx(0.4)

    def test_its_interval_covers(self):
        """Two judges that err in a fifth of the cases: o = 0.68 and e = 0.5, so κ = 0.36."""
        draw = np.random.default_rng(3)
        truth = draw.integers(0, 2, (200, 150))
        a, b = (np.where(draw.random(truth.shape) < 0.2, 1 - truth, truth) for _ in range(2))
        found = [cohen_kappa(x, y, Clusters.single(150)) for x, y in zip(a, b, strict=True)]
        assert 0.91 <= np.mean([each.low < 0.36 < each.high for each in found]) <= 0.99

    def test_judges_that_say_one_thing_have_none(self):
        found = cohen_kappa([1, 1], [1, 1], Clusters.single(2))
        assert math.isnan(found.value)
        assert "one and the same outcome" in found.not_estimable

    def test_judges_that_agree_everywhere_have_no_interval(self):
        found = cohen_kappa([1] * 5 + [-1] * 5, [1] * 5 + [-1] * 5, Clusters.single(10))
        assert found.value == 1.0
        assert found.not_estimable == "both judges agree on every pair"

    def test_a_tie_and_a_disagreement_are_one_outcome(self):
        assert outcomes(judged([1, 0, 0.5, 1, 0.5], [1, 0, 0.5, 0, 1])).tolist() == [1, -1, 0, 0, 0]
