"""Rewrites as differences of words, and the prompts that changed most."""

import pytest

from alignpro.evaluation.changes import largest_changes, word_diff
from alignpro.evaluation.results import SampleRow


def shown(a: str, b: str) -> str:
    marks = {"same": "{}", "deleted": "[-{}-]", "inserted": "[+{}+]"}
    return "".join(marks[piece.kind].format(piece.text) for piece in word_diff(a, b))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("explain dns", "explain dns briefly", "explain dns [+briefly+]"),
        ("explain  dns\nplease", "explain dns", "explain dns[-please-]"),
        ("a b c", "a x c", "a [-b -][+x +]c"),
        ("same text", "same text", "same text"),
        ("", "new", "[+new+]"),
        ("gone", "", "[-gone-]"),
        ("", "", ""),
    ],
)
def test_words_are_compared(a, b, expected):
    assert shown(a, b) == expected


def test_what_is_not_deleted_is_the_rewrite():
    a, b = "Tell me how  to bake a cake.\n\nThanks!", "  How do I bake a cake?\nAnswer in one short sentence."
    assert "".join(piece.text for piece in word_diff(a, b) if piece.kind != "deleted") == b


def row(arm: str, prompt: str, reward: float, rewrite: str | None = None) -> SampleRow:
    return SampleRow(
        arm=arm, prompt=prompt, rewrite=rewrite, response=f"{arm} to {prompt}", reward=reward, penalised=reward
    )


def test_the_largest_gains_come_first_and_the_largest_losses_last():
    rows = [row("no_finetuning", name, 0.5) for name in "abcd"]
    rows += [
        row("align_pro", name, 0.5 + gain, f"{name} please")
        for name, gain in zip("abcd", (0.1, 0.4, -0.3, 0.0), strict=True)
    ]
    rows += [row("align_pro", "b", 1.0, "b best"), row("align_pro", "unpaired", 1.0, "x")]
    changes = largest_changes(rows)
    assert [change.gain for change in changes] == pytest.approx([0.45, 0.1, -0.3])
    assert "".join(piece.text for piece in changes[0].rewrite) == "b best"
    assert changes[0].before == "no_finetuning to b"
    assert changes[0].rewards == pytest.approx((0.5, 0.95))
    assert len(largest_changes(rows, 1)) == 2
    assert largest_changes(rows[:4]) == []
