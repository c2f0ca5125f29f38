"""`alignpro pareto`: mixtures of two runs beside a run for the weighted sum, on the same prompts, by both rewards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_runs import finished_run

from alignpro.cli import main
from alignpro.demo.world import prompt_records, write_records
from alignpro.errors import ConfigError, TrainingError
from alignpro.evaluation.pareto import compare_mixtures

Directory = Callable[[str], Path]
REWARDS = """
def short(prompts, responses):
    return [-len(each) / 20 for each in responses]

def letters(prompts, responses):
    return [sum(map(ord, each)) % 17 / 17 for each in responses]
"""


def runs(out: Path, models: Directory) -> list[Path]:
    """Two runs for a reward each, and one for their sum."""
    write_records(out / "prompts.jsonl", prompt_records(12, 0, heldout=False))
    (out / "rewards.py").write_text(REWARDS)
    made = {"short": ["short"], "letters": ["letters"], "both": ["short", "letters"]}
    for seed, (name, functions) in enumerate(made.items()):
        components = [
            {"kind": "function", "function": f"{out}/rewards.py:{each}", "weight": 1 / len(functions)}
            for each in functions
        ]
        sections: dict[str, Any] = {
            "data": {"source": str(out / "prompts.jsonl"), "holdout": 0.5},
            "reward": {"components": components},
        }
        finished_run(out / name, models, "lora", seed=seed, **sections)
    return [out / name for name in made]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, model_directory: Directory) -> list[Path]:
    return runs(tmp_path_factory.mktemp("pareto"), model_directory)


def test_mixtures_are_compared_with_what_was_trained_for_the_sum(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, both = map(str, three)
    sizes = ["--prompts", "3", "--rewrites", "2", "--weights", "0"]
    with pytest.raises(SystemExit, match="0"):
        main(["pareto", first, second, "--trained", f"0.5={both}", "--out", str(tmp_path / "out"), *sizes])
    found = json.loads((tmp_path / "out/pareto.json").read_text())
    places = [(each["series"].split()[0], each["weight"]) for each in found["points"]]
    assert places == [("mixture", 0.0), ("mixture", 0.5), ("trained", 0.5)]
    assert all(each["kl"]["value"] > 0 and len(each["rewards"]) == 2 for each in found["points"])
    (difference,) = found["mixture_above_trained"]
    weighted = {
        each["series"]: sum(reward["value"] for reward in each["rewards"]) / 2
        for each in found["points"]
        if each["weight"] == 0.5
    }
    assert difference["weighted_reward"]["value"] == pytest.approx(
        weighted["mixture"] - weighted["trained for the weighted sum"]
    )
    assert (tmp_path / "out/pareto.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "at 0.50, the mixture less the trained: weighted reward" in said
    with pytest.raises(TrainingError, match="already exists"):
        compare_mixtures(three[:2], tmp_path / "out", trained={})


def test_what_cannot_be_compared_is_named(three: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pareto: 3 runs: give two, one for each reward"):
        compare_mixtures(three, tmp_path / "out", trained={})
    with pytest.raises(ConfigError, match=r"weight 1\.5: expected one of the second reward from 0 to 1"):
        compare_mixtures(three[:2], tmp_path / "out", trained={1.5: three[2]})
    with pytest.raises(SystemExit, match="1"):
        main(["pareto", *map(str, three[:2]), "--out", str(tmp_path / "out"), "--trained", "half"])
    other = tmp_path / "other"
    other.mkdir()
    content = yaml.safe_load((three[1] / "config.yaml").read_text())
    content["target"]["path"] = "elsewhere"
    (other / "config.yaml").write_text(yaml.safe_dump(content))
    (other / "model").symlink_to(three[1] / "model")
    with pytest.raises(ConfigError, match="its target is not that of"):
        compare_mixtures([three[0], other], tmp_path / "out", trained={})
