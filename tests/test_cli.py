"""The command line: help, the dry run, exit statuses, and terminal output."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import Process, Workshop

import alignpro
import alignpro.errors
from alignpro.cli import main
from alignpro.cli.output import StandardErrorHandler, show_warnings_only
from alignpro.config import (
    EvalConfig,
    ExperimentConfig,
    HeadroomConfig,
    OptimalConfig,
    RewardModelConfig,
    RivalConfig,
    RLHFConfig,
    Section,
    SFTConfig,
    SweepConfig,
    TrainConfig,
    load_config,
    validate_config,
)
from alignpro.planning.dry_run import describe_work

TRAINING = ("sft", "reward", "train", "rlhf")
WITH_CONFIG = (*TRAINING, "eval", "headroom", "optimal")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    return int(stopped.value.code or 0)


def words(text: str) -> str:
    """Return a help text without its line breaks."""
    return " ".join(text.split())


# ---------------------------------------------------------------------------------------------------------------- help


def test_no_argument_shows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    shown = capsys.readouterr()
    for command in (*WITH_CONFIG, "rewrite", "demo", "doctor"):
        assert f"\n  {command} " in shown.out + shown.err


@pytest.mark.parametrize("command", TRAINING)
def test_help_of_a_training_command_says_how_to_configure_resume_and_try(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--help") == 0
    shown = words(capsys.readouterr().out)
    for part in (
        f"Usage: alignpro {command} [OPTIONS] {{CONFIG.yaml|key=value}}...",
        "base.yaml mine.yaml run.out=runs/mine optimizer.learning_rate=1e-4",
        "docs/training.md explains the keys",
        "--dry-run Check the configuration, that models, data and rewards exist and fit",
        "--resume Continue the run in run.out",
        "--at STEP With --resume: continue from the checkpoint of this step",
    ):
        assert part in shown


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("train", TrainConfig),
        ("eval", EvalConfig),
        ("headroom", HeadroomConfig),
        ("optimal", OptimalConfig),
        ("experiment", ExperimentConfig),
        ("sweep", SweepConfig),
        ("rival", RivalConfig),
    ],
)
def test_the_overrides_in_a_command_s_help_are_keys_of_its_own(
    command: str, kind: type[Section], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--help") == 0
    shown = words(capsys.readouterr().out)
    overrides = re.search(r"base.yaml mine.yaml (\S+=\S+) (\S+=\S+)\. docs/\w+\.md explains", shown)
    assert overrides
    for override in overrides.groups():
        section: Any = kind
        for name in override.partition("=")[0].split("."):
            section = section.model_fields[name].annotation


@pytest.mark.parametrize("command", [*WITH_CONFIG, "rewrite", "demo"])
def test_a_command_without_its_arguments_shows_its_usage(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command) == 2
    shown = capsys.readouterr()
    assert f"Usage: alignpro {command}" in shown.out + shown.err


def test_an_unknown_option_suggests_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "x.yaml", "--resum") == 2
    assert "--resume" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"{alignpro.__version__}\n"


def test_help_and_configuration_errors_do_not_load_torch() -> None:
    script = (
        "import sys\nfrom alignpro.cli import main\nfrom alignpro.cli.output import StandardErrorHandler, show_warnings_only\n"
        "for arguments in (['train', '--help'], ['train', 'nowhere.yaml'], ['train', 'a.b=1', '--dry-run']):\n"
        "    try:\n        main(arguments)\n    except SystemExit as stop:\n        print(stop.code)\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-4:] == ["0", "1", "1", "[]"]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_the_configuration(arguments: Sequence[str]) -> None:
    script = (
        f"import sys\nfrom alignpro.__main__ import main\nsys.argv[1:] = {arguments}\n"
        "try:\n    main()\nfinally:\n"
        "    print([name for name in ('torch', 'transformers', 'omegaconf', 'alignpro.config') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_missing_files_are_errors_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "rewrite": "b"}\n')
    (tmp_path / "model").mkdir()
    sft = [f"run={{out: {tmp_path}/run, steps: 1}}", f"data.source={tmp_path}/prompts.jsonl"]
    arms = [f"out={tmp_path}/out", *sft[1:], "reward.components=[{kind: function, function: a:b}]"]
    given = {
        "`policy.path` names a model": ["sft", *sft, "policy.path=./none"],
        "`policy.tokenizer` names a model": ["sft", *sft, f"policy.path={tmp_path}/model", "policy.tokenizer=./none"],
        "none.jsonl: no such file": ["sft", *sft, f"policy.path={tmp_path}/model", "data.source=none.jsonl"],
        "`target.path` names a model": ["eval", *arms, "target.path=./none"],
        "`prompter.path` names a model": ["optimal", *arms, f"target.path={tmp_path}/model", "prompter.path=./none"],
        "nowhere: has no config.yaml": ["rewrite", "x", "--run", "nowhere"],
        "./none: no such directory": ["plan", *arms[1:], *sft, f"policy.path={tmp_path}/model", "target.path=./none"],
    }
    script = (
        f"import sys\nfrom alignpro.cli import main\nfor arguments in {list(given.values())}:\n"
        "    try:\n        main(arguments)\n    except SystemExit as stop:\n        print(stop.code)\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [*["1"] * len(given), "[]"], done.stderr
    for said in given:
        assert said in done.stderr


# ------------------------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize("command", TRAINING)
def test_a_dry_run_prints_a_configuration_that_loads_and_touches_nothing(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    out = tmp_path / "run"
    assert workshop.run(command, out, "optimizer.learning_rate=0.25", "--dry-run") == 0
    printed = capsys.readouterr().out
    (tmp_path / "resolved.yaml").write_text(printed)
    kinds = {"sft": SFTConfig, "reward": RewardModelConfig, "train": TrainConfig, "rlhf": RLHFConfig}
    arguments = workshop.arguments(command, out, "optimizer.learning_rate=0.25")[1:]
    assert load_config(kinds[command], [str(tmp_path / "resolved.yaml")]) == load_config(kinds[command], arguments)
    assert "learning_rate: 0.25" in printed
    assert "weight_decay: 0.0" in printed, "defaults are missing"
    assert f"write to {out}" in printed
    assert not out.exists()


def test_a_dry_run_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["policy.path=no/model", "data.source=no.jsonl", f"run.out={tmp_path / 'run'}", "--dry-run"]
    assert run("sft", *arguments) == 1
    assert "no such" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


BASE = {"data": {"source": "x.jsonl"}, "reward": {"components": [{"kind": "function", "function": "a:b"}]}}
MODEL = {"path": "models/small"}
PPO = {"loss": "ppo_clip", "epochs": 2, "minibatches": 4}


@pytest.mark.parametrize(
    ("kind", "given", "lines"),
    [
        (
            TrainConfig,
            {
                **BASE,
                "run": {"out": "r", "steps": 1000, "eval_every": 20},
                "policy": {**MODEL, "adapter": {"kind": "lora"}},
                "target": {"path": "models/large"},
                "rollout": {"prompts_per_step": 16, "rewrites_per_prompt": 8, "responses_per_rewrite": 2},
                "objective": PPO,
            },
            [
                "train models/small (lora) against the frozen models/large",
                "1,000 steps × 16 prompts × 8 rewrites × 2 responses: 128 chains per step, 128,000 rewrites and "
                "256,000 responses in total",
                "8,000 optimizer updates (8 per step), loss ppo_clip",
                "write to r: a checkpoint every 50 steps and at the end (2 kept); evaluation every 20 steps",
            ],
        ),
        (
            RLHFConfig,
            {**BASE, "run": {"out": "r", "steps": 10}, "policy": MODEL, "rollout": {"responses_per_prompt": 4}},
            [
                "RLHF of models/small (full)",
                "10 steps × 16 prompts × 4 responses: 64 responses per step, 640 responses in total",
                "10 optimizer updates (1 per step), loss policy_gradient",
                "write to r: a checkpoint every 50 steps and at the end (2 kept); evaluation never",
            ],
        ),
        (
            SFTConfig,
            {"run": {"out": "r", "steps": 10}, "data": BASE["data"], "policy": MODEL, "batch_size": 8},
            ["fine-tune models/small (full) on (prompt, rewrite) pairs", "10 steps × 8 pairs: 80 pairs in total"],
        ),
        (
            RewardModelConfig,
            {"run": {"out": "r", "steps": 10}, "data": BASE["data"], "model": MODEL, "batch_size": 1},
            ["train a reward model from models/small", "10 steps × 1 pair: 10 pairs in total"],
        ),
        (
            EvalConfig,
            {**BASE, "out": "e", "target": MODEL, "prompter": MODEL, "oracle": MODEL, "prompts": 30},
            [
                "compare no fine-tuning, prompter, oracle on at most 30 held-out prompts",
                "4 rewrites per prompt × 2 responses each",
                "write to e",
            ],
        ),
        (
            EvalConfig,
            {
                **BASE,
                "out": "e",
                "target": MODEL,
                "reference": MODEL,
                "gibbs_candidates": [4, 2],
                "instructions": {"a": "b"},
            },
            ["compare no fine-tuning, instruction_a, reference, gibbs_2, gibbs_4 on at most 128 held-out prompts"],
        ),
        (
            OptimalConfig,
            {**BASE, "out": "e", "target": MODEL, "prompter": MODEL, "prompts": 30, "candidates": 7},
            ["7 candidate rewrites for each of at most 30 prompts × 2 responses each", "write to e"],
        ),
    ],
)
def test_the_plan_counts_right(kind: type[Section], given: dict[str, object], lines: Sequence[str]) -> None:
    assert describe_work(validate_config(kind, given))[: len(lines)] == list(lines)


@pytest.mark.parametrize(
    ("adapter", "said"), [({}, "its adapter"), ({"kind": "full"}, "full"), ({"kind": "lora"}, "lora")]
)
def test_the_plan_says_that_an_adapter_goes_on_training(adapter: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    policy = {"path": str(tmp_path), "adapter": adapter}
    config = {"run": {"out": "r", "steps": 10}, "data": BASE["data"], "policy": policy}
    assert describe_work(validate_config(SFTConfig, config))[0].startswith(f"fine-tune {tmp_path} ({said}) on")


def test_the_dry_run_of_an_evaluation(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = yaml.safe_load((workshop.root / "train.yaml").read_text())
    config = {name: given[name] for name in ("data", "target", "reward")} | {"out": str(tmp_path / "e")}
    drawn = {"max_tokens": 4}
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config | {"rewrite": drawn, "respond": drawn}))
    assert run("eval", str(tmp_path / "eval.yaml"), "--dry-run") == 0
    assert "# compare no fine-tuning on at most 128 held-out prompts\n" in capsys.readouterr().out
    assert not (tmp_path / "e").exists()


# ------------------------------------------------------------------------------------------------------------ output


@pytest.mark.parametrize("command", TRAINING)
def test_a_run_shows_its_progress_and_no_output_of_libraries(workshop: Workshop, tmp_path: Path, command: str) -> None:
    process = Process(workshop.arguments(command, tmp_path / "run"), tmp_path / "log")
    assert process.wait() == 0
    shown = process.output()
    for part in ("step 1/4", "step 4/4", " left"):
        assert part in shown
    for chatter in ("Loading weights", "Writing model shards", "it/s]", "Warning"):
        assert chatter not in shown


def test_messages_go_to_the_current_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """A progress bar replaces standard error while it is shown, so that messages appear above the bar."""
    handler = StandardErrorHandler()
    handler.emit(logging.makeLogRecord({"msg": "before"}))
    with redirect_stderr(io.StringIO()) as bar:
        handler.emit(logging.makeLogRecord({"msg": "beware"}))
    assert bar.getvalue() == "beware\n"
    assert capsys.readouterr().err == "before\n"


def test_an_error_with_text_that_utf8_cannot_encode_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise alignpro.errors.AlignProError("the judge said \ud800")

    monkeypatch.setattr("alignpro.config.load_config", broken)
    assert run("train", "x.yaml") == 1
    assert capsys.readouterr().err == "error: the judge said \\ud800\n"


@pytest.mark.parametrize("out", ["a file", "a name that is too long"])
def test_the_demo_says_where_it_cannot_write(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a file").touch()
    place = tmp_path / (out if out == "a file" else "x" * 300)
    assert run("demo", "--out", str(place)) == 1
    error = capsys.readouterr().err
    assert ("is a file; choose another --out" if out == "a file" else "the path is too long") in error


def test_seeds_have_63_bits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--out", "nowhere", "--seed", str(2**63)) == 2
    assert "--seed" in capsys.readouterr().err


def test_interrupts_end_a_command_quietly(tmp_path: Path) -> None:
    """While it is loaded, while it works, and a second time while it cleans up."""
    start = "import os, signal, sys\nfrom alignpro.distributed.interrupts import exit_at_interrupt, quiet_interrupts\n"
    kill = "os.kill(os.getpid(), signal.SIGINT)\n"
    loading = f"{start}with quiet_interrupts(), exit_at_interrupt():\n  {kill}  print('still here')"
    working = "import alignpro.cli\nfrom alignpro import __main__\nimport os, signal\n"
    working += f"alignpro.cli.main = lambda: {kill}\n__main__.main()"
    cleaning = "import alignpro.cli\nfrom alignpro import __main__\nimport os, signal\n"
    cleaning += f"def work():\n  try:\n    {kill}  finally:\n    {kill}    print('still here')\n"
    cleaning += "alignpro.cli.main = work\n__main__.main()"
    for program in (loading, working, cleaning):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_a_weight_of_a_trained_run_is_given_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = ("--trained", "0.5=a", "--trained", "0.50=b")
    assert run("pareto", "x", "y", *trained, "--out", str(tmp_path / "out")) == 1
    assert "--trained 0.50=b: a has this weight already" in words(capsys.readouterr().err)


def test_at_needs_resume(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.run("train", tmp_path / "run", "--at", "2") == 1
    assert "error: --at names the checkpoint to continue from: it requires --resume\n" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_bug_is_not_reported_as_a_user_error(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug report needs its traceback."""
    monkeypatch.setattr("alignpro.config.load_config", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "x.yaml"])


def test_what_was_trained_can_be_used(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fine-tune, train from the result, rewrite."""
    assert workshop.run("sft", tmp_path / "sft") == 0
    assert workshop.run("train", tmp_path / "train", f"policy.path={tmp_path}/sft/model") == 0
    capsys.readouterr()
    arguments = ["--run", str(tmp_path / "train"), "--n", "2", "--temperature", "1", "--answer"]
    assert run("rewrite", "flip the word stone", *arguments) == 0
    first = capsys.readouterr().out
    assert len(first.splitlines()) >= 4, "expected two rewrites with an answer each"
    assert run("rewrite", "flip the word stone", *arguments) == 0
    assert capsys.readouterr().out == first, "the seed decides"
    out = tmp_path / "rewrites.jsonl"
    given = ["--data", str(workshop.root / "prompts.jsonl"), "--out", str(out)]
    assert run("rewrite", *given, *arguments) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 24
    assert all(row["prompt"] and len(row["rewrites"]) == len(row["responses"]) == 2 for row in rows)
    assert run("rewrite", *given, *arguments) == 1
    assert f"error: {out}: already exists" in capsys.readouterr().err


def test_a_prompter_of_sft_rewrites(workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert workshop.run("sft", tmp_path / "sft") == 0
    capsys.readouterr()
    assert run("rewrite", "flip the word stone", "--run", str(tmp_path / "sft")) == 0
    assert capsys.readouterr().out.strip()
    assert run("rewrite", "flip the word stone", "--run", str(tmp_path / "sft"), "--answer") == 1
    assert "is a run of `alignpro sft`, which has no target to answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("model: {path: m}\n", "is a run of `alignpro reward`, whose model scores"),
        ("policy: {path: m}\nreward: {components: []}\n", "is a run of `alignpro rlhf`, whose model responds"),
        (
            "run: {out: r, steps: 1}\ndata: {source: x}\npolicy: {path: m}\ntask: response\n",
            "is a run of `alignpro sft` with task=response, not of a prompter",
        ),
        ("- policy\n", "expected a mapping of keys at the top level"),
        ("policy: {path: [\n", "not valid YAML"),
    ],
)
def test_a_run_that_holds_no_prompter_is_named(
    content: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "config.yaml").write_text(content)
    assert run("rewrite", "x", "--run", str(tmp_path)) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("inside", ["model", "checkpoints/step_000001"])
def test_a_directory_inside_a_run_names_the_run(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/x/model").mkdir(parents=True)
    Path("runs/x/config.yaml").touch()
    Path("runs/x", inside).mkdir(parents=True, exist_ok=True)
    assert run("rewrite", "x", "--run", f"runs/x/{inside}") == 1
    assert f"runs/x/{inside}: is inside the run directory runs/x: give that\n" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "runs" / "x" / inside)
    assert run("rewrite", "x", "--run", ".") == 1
    assert f"is inside the run directory {tmp_path}/runs/x: give that\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    "given", [[], ["x", "--data", "y.jsonl", "--out", "z"], ["--data", "y.jsonl"], ["x", "--out", "z"]]
)
def test_rewrite_takes_prompts_or_data(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rewrite", "--run", "nowhere", *given) == 1
    assert capsys.readouterr().err.startswith("error: rewrite: ")


def test_rewriting_prompts_shows_warnings_only() -> None:
    handler, root = StandardErrorHandler(), logging.getLogger()
    root.addHandler(handler)
    try:
        show_warnings_only()
        assert handler.level == logging.WARNING
    finally:
        root.removeHandler(handler)


@pytest.mark.parametrize(("arguments", "status", "ended"), [(["--version"], 0, "the end\n"), (["rewrite", "x"], 2, "")])
def test_only_rewrite_ends_without_the_interpreters_own_end(arguments: list[str], status: int, ended: str) -> None:
    """Which takes seconds once torch has been imported."""
    script = (
        f"import atexit, sys; sys.argv = {['alignpro', *arguments]!r}; from alignpro.__main__ import main;"
        "atexit.register(lambda: print('the end')); main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.endswith(ended) and ("the end" in done.stdout) == bool(ended)
    assert ("--run" in done.stderr) == (arguments[0] == "rewrite")  # which it lacks
