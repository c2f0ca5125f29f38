"""`alignpro report` on directories of evaluations, experiments and runs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic_records import records

from alignpro.cli import main
from alignpro.errors import DataError
from alignpro.evaluation.comparison import Record
from alignpro.evaluation.comparison_results import Cost
from alignpro.evaluation.directory_report import report_directories
from alignpro.evaluation.evaluated import find_evaluations, records_of, training_cost

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


def write_cell(root: Path, record: Record, *, words: int = 12) -> Path:
    """The directory of an evaluation as an experiment writes it, with two samples per prompt."""
    directory = root / record.task / record.method / f"seed_{record.seed}"
    directory.mkdir(parents=True)
    (directory / "rewards.json").write_text(json.dumps(record.rewards.as_dict()))
    cost = {"target_calls": record.cost.target_calls, "tokens": record.cost.tokens, "seconds": record.cost.seconds}
    named = {key: getattr(record, key) for key in ("task", "prompter", "target", "seed")}
    methods = {arm: {"method": record.method, "cost": cost} for arm in record.rewards.arms}
    (directory / "record.json").write_text(json.dumps(named | {"methods": methods}))
    with (directory / "samples.jsonl").open("w") as file:
        for i, rewards in enumerate(record.rewards.arms[record.method].raw):
            for reward in rewards[:, 0]:
                prompt = f"prompt {i}: " + "please explain this to me " * (words // 6)
                rewritten = (
                    None if record.method == "no_finetuning" else prompt + "Answer in one short sentence <b>now</b>."
                )
                row = {
                    "arm": record.method,
                    "prompt": prompt,
                    "rewrite": rewritten,
                    "response": f"{record.method} {i} {reward:.6f} " + "word " * words,
                    "reward": reward,
                    "penalised": reward,
                }
                file.write(json.dumps(row) + "\n")
    return directory


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experiment")
    for record in records(("house style", "numbered list"), seeds=2):
        write_cell(root, record)
    return root


def test_an_experiment_is_one_report(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "report.html"
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(experiment), "--out", str(out), "--paper"])
    assert not stopped.value.code
    verdict = "Align-Pro is above no fine-tuning on 2 of 2 tasks after correction for all comparisons."
    assert verdict in capsys.readouterr().out
    html = out.read_text()
    assert verdict in html
    for shown in (
        "numbered list",
        "Gibbs, N = 16",
        "<ins>Answer in one short sentence &lt;b&gt;now",
        "UltraFeedback",
        "2,560",
    ):
        assert shown in html
    assert "to see 0.05 you need" in html


def test_a_report_to_publish_has_no_text_of_the_data(experiment: Path, tmp_path: Path) -> None:
    html = {}
    for name, options in (("whole", []), ("published", ["--no-texts"])):
        with pytest.raises(SystemExit):
            main(["report", str(experiment), "--out", str(tmp_path / name), *options])
        html[name] = (tmp_path / name).read_text()
    for text in ("please explain this to me", "Answer in one short sentence", "word word"):
        assert text in html["whole"]
        assert text not in html["published"]
    assert "Align-Pro is above no fine-tuning on 2 of 2 tasks" in html["published"]


def test_a_report_of_a_thousand_prompts_is_small(tmp_path: Path) -> None:
    for record in records(seeds=1, means={"no_finetuning": 0.2, "align_pro": 0.7, "oracle": 0.9}, prompts=1000):
        write_cell(tmp_path / "cells", record, words=300)
    report_directories([tmp_path / "cells"], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert "samples; samples.jsonl has all." in (tmp_path / "report.html").read_text()


def run_directory(root: Path, name: str, seed: int, steps: int = 20, **objective: float) -> Path:
    run = root / name
    (run / "model").mkdir(parents=True)
    config = {"run": {"seed": seed, "out": str(run)}, "policy": {"path": "models/P1"}, "objective": objective}
    config["rollout"] = {"prompts_per_step": 8, "rewrites_per_prompt": 4, "responses_per_rewrite": 2}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": i, "kl": 0.1 * i, "reward/mean": 0.3, "seconds/rollout": 2.0} for i in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def write_evaluation(root: Path, run: Path, record: Record, base: Record) -> Path:
    directory = root / f"eval_{run.name}"
    directory.mkdir()
    content = record.rewards.as_dict()
    content["seed"] = 0
    content["arms"] |= base.rewards.as_dict()["arms"]
    (directory / "rewards.json").write_text(json.dumps(content))
    config = {"title": "T", "prompter": {"path": str(run / "model")}, "target": {"path": "models/F1"}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    return directory


def test_runs_that_differ_in_their_seed_are_one_method(tmp_path: Path) -> None:
    base, *ours = records(means={"no_finetuning": 0.2, "align_pro": 0.7})
    runs = [run_directory(tmp_path, f"run{i}", seed=i) for i in range(3)]
    for run, record in zip(runs, ours, strict=True):
        write_evaluation(tmp_path, run, record, base)
    found, notes = records_of(find_evaluations([tmp_path]))
    assert sorted((each.method, each.seed) for each in found) == [
        ("align_pro", 0),
        ("align_pro", 1),
        ("align_pro", 2),
        ("no_finetuning", 0),
    ]
    assert notes == []  # no fine-tuning was evaluated three times, with equal rewards
    trained = next(each for each in found if each.method == "align_pro")
    assert (trained.prompter, trained.target, trained.cost.target_calls, trained.cost.seconds) == (
        "P1",
        "F1",
        20 * 64,
        40.0,
    )
    compared = report_directories([tmp_path], tmp_path / "report.html")
    assert compared.groups[0].method("align_pro").seeds == 3
    assert 'alt="Reward against the KL' in (tmp_path / "report.html").read_text()


def test_runs_that_differ_otherwise_are_compared(tmp_path: Path) -> None:
    base, *ours = records(means={"no_finetuning": 0.2, "align_pro": 0.7}, seeds=2)
    runs = [run_directory(tmp_path, f"run{i}", seed=0, kl=0.1 * i) for i in range(2)]
    for run, record in zip(runs, ours, strict=True):
        write_evaluation(tmp_path, run, record, base)
    (group,) = report_directories([tmp_path], tmp_path / "report.html").groups
    assert [each.label for each in group.methods] == ["No fine-tuning", "Align-Pro (run0)", "Align-Pro (run1)"]


def test_training_runs_alone_are_shown_without_a_claim(tmp_path: Path) -> None:
    run = run_directory(tmp_path, "run", seed=0)
    assert report_directories([run], tmp_path / "report.html") is None
    html = (tmp_path / "report.html").read_text()
    assert "nothing here was evaluated on held-out prompts" in html
    assert 'alt="Training curves"' in html


def test_what_holds_nothing_or_is_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither an evaluation"):
        report_directories([tmp_path], tmp_path / "report.html")
    cell = write_cell(tmp_path, records(means={"align_pro": 0.5}, seeds=1)[0])
    (cell / "samples.jsonl").write_text('{"arm": "align_pro"}\n{cut')
    with pytest.raises(
        DataError, match=r"samples\.jsonl:2: cannot be read: .*; remove the file to report without samples"
    ):
        report_directories([tmp_path], tmp_path / "report.html")
    (cell / "record.json").write_text('{"task": "a"}')
    with pytest.raises(DataError, match=r"record.json: lacks target, seed, methods"):
        report_directories([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def open_in_browser(page: Path) -> tuple[str, str]:
    """The page's elements after its script has run, and what the browser logged."""
    assert CHROMIUM is not None
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
    ]
    command = [CHROMIUM, *quiet, f"--user-data-dir={page.parent}/user", "--virtual-time-budget=2000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_browser_shows_it_without_an_error_or_a_request(experiment: Path, tmp_path: Path) -> None:
    """The page's policy forbids requests, so that one would be an error on the console, as an added image shows."""
    report_directories([experiment], tmp_path / "report.html")
    shown, log = open_in_browser(tmp_path / "report.html")
    assert "CONSOLE" not in log
    assert shown.partition('<tbody id="body">')[2].partition("</tbody>")[0].count("<tr") == 25
    html = (tmp_path / "report.html").read_text().replace("</header>", '<img src="http://127.0.0.1:9/a.png"></header>')
    (tmp_path / "asking.html").write_text(html)
    _, log = open_in_browser(tmp_path / "asking.html")
    assert "CONSOLE" in log


def test_the_cost_of_a_training_is_that_of_its_rollouts(tmp_path: Path) -> None:
    """Evaluations during training have rows of their own among the metrics; what is awaited is a part of the rollout."""
    step = {"reward/mean": 0.5, "engine/computed/decode": 100.0, "seconds/rollout": 2.0, "seconds/target": 1.5}
    rows = [step, step, {"eval/reward": 0.4}, step, {"eval/reward": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row | {'step': i})}\n" for i, row in enumerate(rows)))
    rollout = {"prompts_per_step": 4, "rewrites_per_prompt": 2, "responses_per_rewrite": 3}
    assert training_cost(tmp_path, {"rollout": rollout}) == Cost(3 * 24.0, 300.0, 6.0)


@pytest.mark.parametrize(
    ("sections", "calls"),
    [
        (
            {"rollout": {"prompts_per_step": 4, "rewrites_per_prompt": 2, "responses_per_rewrite": 3}},
            2 * 4 * (2 * 3 + 1),
        ),
        (
            {"rollout": {"prompts_per_step": 4, "responses_per_prompt": 3}},
            2 * 4 * 3,
        ),  # an oracle has no rewrites to guard
    ],
)
def test_the_responses_that_the_guard_of_refusals_needs_are_part_of_the_cost(
    tmp_path: Path, sections: dict[str, Any], calls: int
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": 0.5}\n')
    reward = {"components": [], "guards": [{"kind": "length", "high": 2.0}, {"kind": "refusal_kept"}]}
    assert training_cost(tmp_path, sections | {"reward": reward}).target_calls == calls
