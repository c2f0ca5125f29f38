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


WRITTEN = {
    "please explain to me how the weather is made": (
        "bitte erkläre mir, wie das Wetter entsteht",
        "guard:language_change",
    ),
    "please explain to me how the rain is made": ("rain?", "guard:length_ratio"),
    "hi there": ("hi there, " * 20, "guard:length_ratio"),
    "please add 12 and 30 for me": ("please add 12 and 13 for me", "guard:numbers_kept"),
    "please tell me what Ada Lovelace wrote": ("please tell me what a mathematician wrote", "guard:names_kept"),
    "please say what `foo_bar(x)` does here": ("please say what the function does here", "guard:code_kept"),
    "please add 7 and 8 for me": ("for me, please add 7 and 8", None),
}
"""Prompt → its rewrite, and what becomes of that."""


def test_the_default_guards_hold_back_what_loses_something(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainedPrompter, "text", lambda _, prompt, __: WRITTEN[prompt.text][0])
    found = outcomes(run, *map(ask, WRITTEN), guards=RewritingConfig().guards)
    assert [each.skipped for each in found] == [reason for _, reason in WRITTEN.values()]
    assert [each.rewrite for each in found] == [rewrite for rewrite, _ in WRITTEN.values()]
    sent = [prompt if reason else rewrite for prompt, (rewrite, reason) in WRITTEN.items()]
    assert [last_text(each.body) for each in found] == sent


def test_a_copy_can_be_held_back_too(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainedPrompter, "text", lambda *_: f"{TEXT}!")
    (outcome,) = outcomes(run, ask(TEXT), guards=(GuardConfig(kind="copy_rate", high=0.9),))
    assert outcome.skipped == "guard:copy_rate"


def test_what_is_no_rewrite_is_not_sent(run: ServedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {"one": "", "two": " \n", TEXT: TEXT}
    monkeypatch.setattr(TrainedPrompter, "text", lambda _, prompt, __: written[prompt.text])
    found = outcomes(run, *map(ask, written))
    assert [each.skipped for each in found] == ["empty", "empty", "unchanged"]
    assert [last_text(each.body) for each in found] == list(written)


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
