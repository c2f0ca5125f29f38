"""Guards: a rewrite that loses something of its prompt is not sent."""

from __future__ import annotations

import pytest
from rewriting_runs import ENGINE, ask, expected, last_text, outcomes, served

from alignpro.config import GuardConfig
from alignpro.config.serving_rewriting import RewritingConfig
from alignpro.environments.trained_prompter import TrainedPrompter
from alignpro.serving.prompt_writer import ServedRun

TEXT = "flip the word stone pls"


@pytest.fixture(scope="module")
def run() -> ServedRun:
    return served()


@pytest.mark.parametrize(
    ("prompt", "rewrite", "reason"),
    [
        (
            "please explain to me how the weather is made",
            "bitte erkläre mir, wie das Wetter entsteht",
            "language_change",
        ),
        ("please explain to me how the weather is made", "weather?", "length_ratio"),
        ("hi there", "hi there, " * 20, "length_ratio"),
        ("please add 12 and 30 for me", "please add 12 and 13 for me", "numbers_kept"),
        ("please tell me what Ada Lovelace wrote", "please tell me what a mathematician wrote", "names_kept"),
        ("please say what `foo_bar(x)` does here", "please say what the function does here", "code_kept"),
        ("please add 12 and 30 for me", "for me, please add 12 and 30", None),
    ],
)
def test_the_default_guards_hold_back_what_loses_something(
    prompt: str, rewrite: str, reason: str | None, run: ServedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedPrompter, "text", lambda *_: rewrite)
    (outcome,) = outcomes(run, ask(prompt), guards=RewritingConfig().guards)
    assert (outcome.skipped, outcome.rewrite) == (f"guard:{reason}" if reason else None, rewrite)
    assert last_text(outcome.body) == (prompt if reason else rewrite)


def test_a_copy_can_be_held_back_too(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainedPrompter, "text", lambda *_: f"{TEXT}!")
    (outcome,) = outcomes(run, ask(TEXT), guards=(GuardConfig(kind="copy_rate", high=0.9),))
    assert outcome.skipped == "guard:copy_rate"


@pytest.mark.parametrize(("rewrite", "reason"), [("", "empty"), (" \n", "empty"), (TEXT, "unchanged")])
def test_what_is_no_rewrite_is_not_sent(
    rewrite: str, reason: str, run: ServedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainedPrompter, "text", lambda *_: rewrite)
    (outcome,) = outcomes(run, ask(TEXT))
    assert (outcome.skipped, outcome.body) == (reason, ask(TEXT).raw)


def test_a_guard_says_what_it_measured_and_what_was_written(run: ServedRun) -> None:
    guards = (GuardConfig(kind="length_ratio", high=0.0), GuardConfig(kind="copy_rate", low=0.0))
    first, again = outcomes(run, ask(TEXT), ask(TEXT), guards=guards)
    assert first.rewrite == expected(run, TEXT) == again.rewrite
    assert first.details is not None
    assert first.details["guard/length_ratio"] == pytest.approx(len(expected(run, TEXT)) / len(TEXT))
    assert "guard/copy_rate" in first.details
    assert again.skipped == "guard:length_ratio"


def test_a_guard_needs_a_range(run: ServedRun) -> None:
    with pytest.raises(ValueError, match="the guard copy_rate needs `low`, `high` or both"):
        RewritingConfig(guards=({"kind": "copy_rate"},))
    with pytest.raises(ValueError, match="a penalty, which only training uses"):
        RewritingConfig(guards=({"kind": "copy_rate", "low": 0.1, "penalty": 1.0},))
    assert RewritingConfig(engine=ENGINE).guards[0].kind == "language_change"
