"""An experiment runs each cell once, whatever happens in between."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_experiment import CommandError, InThisProcess, tiny_experiment
from tiny_runs import Workshop, read_model
from tiny_server import TinyServer

from alignpro.config import ExperimentConfig, resolve_config
from alignpro.errors import ConfigError, Interrupted, TrainingError
from alignpro.evaluation import sampled_arms
from alignpro.evaluation.rewards_file import read_rewards
from alignpro.experiments.run import compare_done, describe_plan, run_experiment

PLAIN_REWARD = "def score(prompts, responses):\n    return [sum(map(ord, each)) % 17 / 17 for each in responses]\n"
NONE = {"none": {"kind": "none"}}
FEW = NONE | {"align_pro": {"kind": "train"}}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    made = Workshop(tmp_path_factory.mktemp("experiment"))
    (made.root / "plain_reward.py").write_text(PLAIN_REWARD)
    return made


def cells_of(out: Path) -> dict[str, dict[str, Any]]:
    """Name → cell.json."""
    return {
        str(path.parent.relative_to(out)): json.loads(path.read_text())
        for path in out.rglob("cell.json")
        if path.parent != out
    }


def test_all_methods_are_run_and_compared(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "all"
    run = InThisProcess()
    evaluation = {"prompts": 4, "rewrites_per_prompt": 2, "responses_per_rewrite": 2}
    config = tiny_experiment(shop, out, prior=True, evaluation=evaluation | {"refusals": {"held_out": "harmless"}})
    run_experiment(config, run)
    made = cells_of(out)
    alone = ("none", "instruction/short", "oracle")
    of_prompter = ("prior/tiny", "gibbs/tiny", "best_of/tiny", "align_pro/tiny", "grpo/tiny", "dial/tiny/s_0.5")
    assert set(made) == {"priors/tiny"} | {f"cells/letters/toy/{each}/seed_0" for each in (*alone, *of_prompter)}
    assert {each["state"] for each in made.values()} == {"done"}
    summary = json.loads((out / "summary.json").read_text())
    page = (out / "report.html").read_text()
    assert "Align-Pro" in page
    assert page.count("4 harmless prompts") == 1  # one table of all methods
    (counted,) = summary["refusals"].values()
    assert len(counted["harmless"]["arms"]) == len(summary["groups"][0]["methods"])
    for method, arm in (("align_pro", "align_pro"), ("gibbs", "gibbs_4"), ("best_of", "best_of_2")):
        kl = read_rewards(out / f"cells/letters/toy/{method}/tiny/seed_0/evaluation/rewards.json").arms[arm].kl
        assert kl is not None and kl.shape == (4,) and (kl > -1e-6).all()
    dial = out / "cells/letters/toy/dial/tiny/s_0.5/seed_0/evaluation"
    record = json.loads((dial / "record.json").read_text())["methods"]["dial_0.5"]
    assert (record["method"], record["label"]) == ("dial_0.5", "Dial, s = 0.5") and record["cost"]["target_calls"] > 0
    arm = json.loads((dial / "summary.json").read_text())["dial_0.5"]
    assert arm["kl"] >= 0 and arm["mean"] is not None  # a point of the frontier
    again = InThisProcess()
    run_experiment(config, again)
    assert again.commands == []


def test_the_recorded_command_repeats_a_cell(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "repeated"
    config = tiny_experiment(shop, out, methods=FEW)
    run = InThisProcess()

    def noting(starter: Sequence[str], arguments: Sequence[str], log: Path, stopped: Callable[[], int | None]) -> int:
        with log.open("a") as file:
            file.write(f"$ alignpro {arguments[0]}\n")
        return run(starter, arguments, log, stopped)

    run_experiment(config, noting)
    cell = out / "cells/letters/toy/align_pro/tiny/seed_0"
    said = (cell / "log.txt").read_text().splitlines()
    assert [line for line in said if line.startswith("$")] == ["$ alignpro train", "$ alignpro eval"]
    rewards, weights = (cell / "evaluation/rewards.json").read_text(), read_model(cell / "run")
    for directory in ("run", "evaluation"):
        (cell / directory).rename(tmp_path / directory)
    commands = json.loads((cell / "cell.json").read_text())["command"].split(" && ")
    assert [command.split()[:2] for command in commands] == [["alignpro", "train"], ["alignpro", "eval"]]
    for command in commands:
        InThisProcess()([], command.split()[1:], cell / "log.txt", lambda: None)
    assert (cell / "evaluation/rewards.json").read_text() == rewards
    assert read_model(cell / "run") == weights


def test_a_cell_that_fails_leaves_the_others_and_is_tried_again(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "failing"
    config = tiny_experiment(shop, out, methods=FEW)

    def fail(arguments: Sequence[str]) -> None:
        if arguments[0] == "train":
            raise CommandError("the disk is full")

    with pytest.raises(TrainingError, match=r"1 of 2 cells failed[^\n]*\n  cells/\S+/align_pro\S+: the disk is full"):
        run_experiment(config, InThisProcess(fail))
    assert cells_of(out)["cells/letters/toy/align_pro/tiny/seed_0"]["error"] == "the disk is full"
    assert (out / "report.html").exists()
    again = InThisProcess()
    run_experiment(config, again)
    assert [command[2] for command in again.commands] == ["train", "eval"]


def test_cells_whose_prompter_could_not_be_prepared_are_not_tried(shop: Workshop, tmp_path: Path) -> None:
    def fail(arguments: Sequence[str]) -> None:
        if arguments[0] == "sft":
            raise CommandError("no pairs")

    run = InThisProcess(fail)
    with pytest.raises(TrainingError, match="align_pro/tiny/seed_0: needs priors/tiny, which failed"):
        run_experiment(tiny_experiment(shop, tmp_path / "unprepared", prior=True, methods=FEW), run)
    assert len(run.commands) == 2  # the prompter, and no fine-tuning


def test_a_signal_stops_the_experiment_and_the_same_command_continues(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    config = tiny_experiment(shop, out, methods=FEW)

    def stop(arguments: Sequence[str]) -> None:
        if arguments[0] == "train":
            os.kill(os.getpid(), signal.SIGTERM)
            raise CommandError("ended by a signal")

    with pytest.raises(Interrupted, match="continue with the same command"):
        run_experiment(config, InThisProcess(stop))
    assert cells_of(out)["cells/letters/toy/align_pro/tiny/seed_0"]["state"] == "stopped"
    again = InThisProcess()
    run_experiment(config, again)
    assert [command[2] for command in again.commands] == ["train", "eval"]


def test_seeds_and_methods_can_be_added_later_but_not_changed(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "growing"
    run_experiment(tiny_experiment(shop, out, methods=NONE), InThisProcess())
    more = InThisProcess()
    run_experiment(tiny_experiment(shop, out, seeds=[0, 1], methods=NONE), more)
    assert len(more.commands) == 1
    other = tiny_experiment(shop, out, methods=NONE, kl_coef=0.2)
    with pytest.raises(TrainingError, match=r"eval.yaml: kl_coef was 0.05, is 0.2.*name another `out`"):
        run_experiment(other, more)
    assert len(more.commands) == 1


def test_cells_that_a_budget_ended_go_on_with_a_higher_one(shop: Workshop, tmp_path: Path) -> None:
    with TinyServer(honours_n=False) as server:
        target: dict[str, Any] = {"endpoint": {"base_url": server.url, "model": "tiny"}}
        config = tiny_experiment(shop, tmp_path / "bought", methods=FEW, targets={"toy": target})
        with pytest.raises(TrainingError, match=r"2 of 2 cells failed(.|\n)*raise budget\.requests"):
            run_experiment(config | {"spending": {"budget": {"requests": 14}}}, InThisProcess())
        asked = server.count
        target["endpoint"]["timeout_seconds"] = 30
        run_experiment(config | {"spending": {"budget": {"requests": 200}}}, InThisProcess())
        assert asked < server.count < 2 * asked + 20
        assert {each["state"] for each in cells_of(tmp_path / "bought").values()} == {"done"}
        target["endpoint"]["system"] = "Be brief."
        with pytest.raises(TrainingError, match=r"target\.endpoint\.system was None, is 'Be brief.'"):
            run_experiment(config, InThisProcess())


def test_a_dial_is_of_a_method_that_trains(shop: Workshop, tmp_path: Path) -> None:
    methods = NONE | {"dial": {"kind": "dial", "of": "none"}}
    with pytest.raises(ConfigError, match=r"methods\.dial\.of=none: expected the key of a method of the kind train"):
        resolve_config(ExperimentConfig, tiny_experiment(shop, tmp_path, methods=methods))


def test_the_plan_says_what_is_left(shop: Workshop, tmp_path: Path) -> None:
    out = tmp_path / "planned"
    run_experiment(tiny_experiment(shop, out, methods=NONE), InThisProcess())
    config = resolve_config(ExperimentConfig, tiny_experiment(shop, out, seeds=[0, 1], methods=NONE))
    first, *lines = describe_plan(config)
    assert first.startswith("2 cells, 1 done; ") and first.endswith(" left")
    assert lines == ["done  cells/letters/toy/none/seed_0", "      cells/letters/toy/none/seed_1"]


def test_nothing_done_cannot_be_compared(shop: Workshop, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no cell is done yet"):
        compare_done(tiny_experiment(shop, tmp_path / "empty"))


def test_refusals_of_the_best_of_n_are_those_of_what_the_reward_chooses_and_costs_are_of_evaluated_prompts(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, weights = tmp_path / "best", list[Any]()
    (tmp_path / "harmful.jsonl").write_text(
        "".join(json.dumps({"prompt": f"sort letter {i}"}) + "\n" for i in range(3))
    )
    plain = sampled_arms._weights

    def record(*arguments: Any) -> Any:
        chosen = plain(*arguments)
        weights.append(chosen)
        return chosen

    monkeypatch.setattr(sampled_arms, "_weights", record)
    evaluation = {"prompts": 100, "rewrites_per_prompt": 2, "responses_per_rewrite": 2}
    refusals = {"harmful": {"source": str(tmp_path / "harmful.jsonl"), "holdout": 0}}
    methods = {"best_of": {"kind": "best_of", "candidates": [3]}}
    run_experiment(
        tiny_experiment(shop, out, methods=methods, evaluation=evaluation | {"refusals": refusals}), InThisProcess()
    )
    (directory,) = out.rglob("rewards.json")
    prompts = len(read_rewards(directory).prompts)
    assert 3 < prompts < 100
    (of_harmful,) = (each for each in weights if len(each) == 3)
    assert (of_harmful.amax(1) > 0.34).all()  # not a third each
    (record_of_cell,) = (json.loads(path.read_text()) for path in out.rglob("record.json"))
    assert record_of_cell["methods"]["best_of_3"]["cost"]["target_calls"] == prompts * 3 * 2
