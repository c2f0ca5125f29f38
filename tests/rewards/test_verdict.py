"""Answers of judges are read strictly: one of the two forms, or nothing."""

import time

import pytest

from alignpro.rewards.verdict import UnreadableAnswerError, parse_preference, parse_score


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Score: 7", 7.0),
        ("It is fine.\n\nScore: 7.5\n", 7.5),
        ("**Score: 7**", 7.0),
        ("> **Score:** 7.", 7.0),
        ("Score: 2\nOn second thoughts\nscore : 10", 10.0),
        ('{"score": 3}', 3.0),
        ('\n{"reason": "fine", "score": 3.5}\n', 3.5),
    ],
)
def test_scores_in_either_form_are_read(answer: str, score: float) -> None:
    assert parse_score(answer, 1, 10) == score


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("", "ends with nothing"),
        ("7", "ends with '7', not with `Score: N`"),
        ("Score: seven", "'Score: seven'"),
        ("Score: 7/10", "'Score: 7/10'"),
        ("Score: 1e1", "'Score: 1e1'"),
        ("Score: ٣", "not with"),
        ("Score: 7 or 8", "not with"),
        ("Score: 7\nThank you.", "'Thank you.'"),
        ("The response says Score: 9", "not with"),
        ("Score: nan", "not with"),
        ("Score: 11", r"a score outside \[1, 10\]"),
        ("Score: 0.5", r"a score outside \[1, 10\]"),
        ("Score: -3", r"a score outside \[1, 10\]"),
        ('{"score": "7"}', "not with"),
        ('{"score": true}', "not with"),
        ('{"score": NaN}', "outside"),
        ('{"score": 1, "score": 9}', "not with"),
        ('{"score": 7} and more', "not with"),
        ('{"grade": 7}', "not with"),
        ('[{"score": 7}]', "not with"),
        ("{" * 100_000, "not with"),
        (f'{{"score": {"9" * 5000}}}', "not with"),
        ("Score: \x1b[31m7", r"\\x1b"),  # quoted such that a terminal does not act on it
    ],
)
def test_anything_else_is_no_score(answer: str, problem: str) -> None:
    with pytest.raises(UnreadableAnswerError, match=problem) as caught:
        parse_score(answer, 1, 10)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("answer", "preference"),
    [("Verdict: A", "A"), ("so\n**verdict: b**", "B"), ("VERDICT: Tie.", "tie"), ('{"verdict": "A"}', "A")],
)
def test_preferences_in_either_form_are_read(answer: str, preference: str) -> None:
    assert parse_preference(answer) == preference


@pytest.mark.parametrize(
    "answer", ["A", "Verdict: C", "Verdict: A or B", "Verdict: A\nor B", '{"verdict": 1}', "{}", ""]
)
def test_anything_else_is_no_preference(answer: str) -> None:
    with pytest.raises(UnreadableAnswerError, match=r"not with `Verdict: A`|nothing"):
        parse_preference(answer)


@pytest.mark.parametrize("filling", ["*", "_", " ", "9", "Score: "])
def test_long_answers_take_no_long_time(filling: str) -> None:
    started = time.perf_counter()
    for length in (190, 1_000_000):
        with pytest.raises(UnreadableAnswerError):
            parse_score("Score: " + filling * (length // len(filling)) + "!", 1, 10)
    assert time.perf_counter() - started < 1
