"""Rewrites are labelled without their method's name, and counted with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from benchmarks.classes import CLASSES, count, draw

RUBRIC = Path(__file__).parents[2] / "docs" / "real" / "classes" / "README.md"


@pytest.fixture
def evaluations(tmp_path: Path) -> list[Path]:
    for arm in ("prior", "align_pro"):
        (tmp_path / arm).mkdir()
        rows = [
            {
                "arm": arm,
                "prompt": f"prompt {i}",
                "rewrite": f"prompt {i}, by {arm[0]} {k}",
                "response": "",
                "reward": 0.0,
            }
            for i in range(30)
            for k in range(2)
        ]
        (tmp_path / arm / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [tmp_path / "prior", tmp_path / "align_pro"]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_labels_are_blind_and_shares_are_of_methods(
    evaluations: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, result = tmp_path / "drawn.jsonl", tmp_path / "shares.json"
    draw(file, evaluations, 20)
    rows, key = rows_of(file), {row["id"]: row["method"] for row in rows_of(tmp_path / "drawn.key.jsonl")}
    assert all(row.keys() == {"id", "prompt", "rewrite", "class"} for row in rows)
    own = [[row["prompt"] for row in rows if key[row["id"]] == arm] for arm in ("prior", "align_pro")]
    assert [len(set(prompts)) for prompts in own] == [20, 20]
    assert [key[row["id"]][0] == row["rewrite"].split()[-2] for row in rows] == [True] * 40
    assert 0 < sum(key[i] == "prior" for i in range(20)) < 20  # not in the order of methods

    with pytest.raises(SystemExit, match=f"row {rows[0]['id']}: class ''"):
        count(file)
    for row in rows:
        row["class"] = "reworded" if key[row["id"]] == "align_pro" else "changed" if row["id"] % 2 else "form"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    count(file, result)
    shares = json.loads(result.read_text())
    kept = shares["prior"]["classes"]["form"]
    assert shares["align_pro"]["kept"] == 1.0
    assert shares["prior"]["kept"] == kept / 20
    assert shares["prior"]["interval"][0] == pytest.approx(scipy.stats.beta.ppf(0.025, kept, 21 - kept))
    assert "align_pro" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists"):
        draw(file, evaluations, 20)


def test_too_few_prompts_are_named(evaluations: list[Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="prior: samples of 30 prompts"):
        draw(tmp_path / "x.jsonl", evaluations, 31)


def test_the_rubric_defines_each_class() -> None:
    assert all(f"| `{name}` |" in RUBRIC.read_text() for name in CLASSES)


@pytest.mark.parametrize("labels", sorted(RUBRIC.parent.glob("*.key.jsonl")), ids=lambda file: file.name.split(".")[0])
def test_committed_shares_are_those_of_the_labels(labels: Path, tmp_path: Path) -> None:
    task = labels.name.split(".")[0]
    count(labels.with_name(f"{task}.jsonl"), tmp_path / "shares.json")
    shares = json.loads((tmp_path / "shares.json").read_text())
    assert shares == json.loads(labels.with_name(f"{task}.json").read_text())
    table = RUBRIC.read_text()
    for name in CLASSES:
        assert (
            f"| {name} | {shares['align_pro']['classes'][name]} | {shares['sft_prompter']['classes'][name]} |" in table
        )
