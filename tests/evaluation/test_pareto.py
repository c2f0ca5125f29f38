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
from alignpro.data import Prompt
from alignpro.demo.world import prompt_records, write_records
from alignpro.errors import ConfigError, ModelError, TrainingError
from alignpro.evaluation import pareto
from alignpro.evaluation.pareto import compare_mixtures, told_apart
from alignpro.training.mixing import mix

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


def test_prompts_of_a_file_take_the_place_of_those_that_were_held_out(three: list[Path], tmp_path: Path) -> None:
    copies = []
    for run in three[:2]:
        copies.append(tmp_path / run.name)
        copies[-1].mkdir()
        content = yaml.safe_load((run / "config.yaml").read_text())
        content["data"]["holdout"] = 0
        (copies[-1] / "config.yaml").write_text(yaml.safe_dump(content))
        (copies[-1] / "model").symlink_to(run / "model")
    with pytest.raises(ConfigError, match=r"short: data\.holdout=0: the run holds no prompts out: name .* --data"):
        compare_mixtures(copies, tmp_path / "out", trained={})
    write_records(tmp_path / "new.jsonl", prompt_records(3, 0, heldout=True))
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        whole = pareto.evaluation_prompts

        def look(*arguments: Any) -> list[Prompt]:
            prompts = whole(*arguments)
            seen.extend(prompt.text for prompt in prompts)
            return prompts

        patch.setattr(pareto, "evaluation_prompts", look)
        files = ["--data", str(tmp_path / "new.jsonl"), "--weights", "0"]
        with pytest.raises(SystemExit, match="0"):
            main(["pareto", *map(str, copies), "--out", str(tmp_path / "out"), *files])
    assert sorted(seen) == sorted(row["prompt"] for row in prompt_records(3, 0, heldout=True))


def test_prompts_that_one_of_the_runs_was_trained_on_are_told(three: list[Path], tmp_path: Path) -> None:
    """Both hold prompts out of one file, the second fewer of them."""
    more = tmp_path / "more"
    more.mkdir()
    content = yaml.safe_load((three[1] / "config.yaml").read_text())
    content["data"]["holdout"] = 0.1
    (more / "config.yaml").write_text(yaml.safe_dump(content))
    (more / "model").symlink_to(three[1] / "model")
    found = compare_mixtures([three[0], more], tmp_path / "out", trained={}, weights=[0], prompts=3)
    assert "more was trained with data.holdout=0.1" in found["note"] and "has seen some of these" in found["note"]
    assert compare_mixtures(three[:2], tmp_path / "apart", trained={}, weights=[0], prompts=3)["note"] is None


def test_a_mixture_that_was_made_is_a_point_beside_both_alone(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "fair"
    made.mkdir()
    summary = {"runs": [str(each) for each in three[:2]], "weights": [0.7, 0.3]}
    (made / "mixture.json").write_text(json.dumps(summary))
    sizes = ["--prompts", "3", "--weights", "0.5", "--mixed", str(made)]
    with pytest.raises(SystemExit, match="0"):
        main(["pareto", *map(str, three[:2]), "--out", str(tmp_path / "out"), *sizes])
    found = json.loads((tmp_path / "out/pareto.json").read_text())
    assert [each["weight"] for each in found["points"]] == [0.0, 0.3, 0.5, 1.0]
    least = [min(reward["value"] for reward in each["rewards"]) for each in found["points"]]
    (mixed,) = found["mixed"]
    assert (mixed["run"], mixed["weight"]) == (str(made), 0.3)
    above = [each["value"] for each in mixed["least_reward_above"]]
    assert above == pytest.approx([least[1] - least[0], least[1] - least[3]])
    assert "at 0.300: its lower reward is above that of either alone by" in capsys.readouterr().out
    with pytest.raises(ModelError, match=r"is a mixture of .*: give these runs, in this order"):
        compare_mixtures([three[1], three[0]], tmp_path / "other", trained={}, mixed=[made])
    with pytest.raises(ModelError, match="not a run directory that `alignpro mix` has made of two runs"):
        compare_mixtures(three[:2], tmp_path / "other", trained={}, mixed=[three[0]])


def test_of_a_mixture_that_was_made_one_model_that_model_is_measured(three: list[Path], tmp_path: Path) -> None:
    """Its rewrites are not those of the mixture, which it approximates."""
    made = tmp_path / "one"
    summary = mix(three[:2], made, weights=[0.7, 0.3], one_model=True, prompts=2, rewrites=3)
    found = compare_mixtures(three[:2], tmp_path / "out", trained={}, mixed=[made], weights=[0.3], prompts=3)
    places = [(each["series"], each["weight"]) for each in found["points"]]
    assert places == [("mixture", 0.0), ("mixture", 0.3), ("mixture", 1.0), ("one model", 0.3)]
    kl = {place: each["kl"]["value"] for place, each in zip(places, found["points"], strict=True)}
    assert summary["gap_of_one_model"]["kl"] > 0 and kl["mixture", 0.3] != kl["one model", 0.3]
    (mixed,) = found["mixed"]
    assert mixed["series"] == "one model"
    least = {
        place: min(one["value"] for one in each["rewards"]) for place, each in zip(places, found["points"], strict=True)
    }
    assert mixed["least_reward_above"][0]["value"] == pytest.approx(least["one model", 0.3] - least["mixture", 0.0])


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


def test_runs_of_cells_are_told_apart_by_what_differs() -> None:
    cells = [Path("runs/e/cells") / task / "big/align_pro/small/seed_0/run" for task in ("letters", "digits")]
    assert told_apart(*cells) == ("letters", "digits")
    assert told_apart(Path("runs/short"), Path("runs/polite")) == ("short", "polite")
    assert told_apart(Path("a"), Path("b/a")) == ("a", "b/a")
