"""The front door for Python: `alignpro.train`, `alignpro.evaluate` and `alignpro.Rewriter`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_runs import Workshop, assert_same, read_metrics, steps_of_checkpoints
from transformers.utils import logging as transformers_logging

import alignpro
from alignpro.config import ModelConfig, RLHFConfig, SFTConfig, TrainConfig, load_config
from alignpro.data import Prompt
from alignpro.demo.world import reward
from alignpro.errors import AlignProError, ConfigError
from alignpro.models.loading import load_language_model


def configuration(workshop: Workshop, out: Path, function: Any, **run: Any) -> dict[str, Any]:
    """Return the configuration of `alignpro train` as a program would write it, with `Path` objects."""
    config: dict[str, Any] = yaml.safe_load((workshop.root / "train.yaml").read_text())
    config["run"] |= {"out": out, **run}
    config["data"]["source"] = workshop.root / "prompts.jsonl"
    config["policy"]["path"] = workshop.root / "prompter"
    config["reward"] = {"components": [{"kind": "function", "function": function}]}
    return config


def brevity(prompts: Sequence[Prompt], responses: Sequence[str], unit: float = 10.0) -> list[float]:
    return [-len(response) / unit for response in responses]


def test_the_import_is_cheap_and_lists_what_there_is() -> None:
    script = (
        "import sys, alignpro\nprint([name for name in ('torch', 'pydantic', 'rich') if name in sys.modules])\n"
        "print({'train', 'evaluate', 'Rewriter'} <= set(dir(alignpro)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True"]
    starred: dict[str, Any] = {}
    exec("from alignpro import *", starred)
    assert [starred[name].__name__ for name in ("train", "evaluate", "Rewriter")] == ["train", "evaluate", "Rewriter"]
    with pytest.raises(AttributeError, match="module 'alignpro' has no attribute 'trian'"):
        alignpro.trian  # noqa: B018


def test_a_function_is_the_same_reward_as_its_dotted_name(workshop: Workshop, tmp_path: Path) -> None:
    run = alignpro.train(configuration(workshop, tmp_path / "function", reward))
    alignpro.train(configuration(workshop, tmp_path / "name", "alignpro.demo.world:reward"))
    assert_same(run.out, tmp_path / "name")
    assert [row["step"] for row in run.metrics] == [1, 2, 2, 3, 4, 4]
    assert "reward/reward" in run.metrics[0]
    assert "function: alignpro.demo.world:reward\n" in (run.out / "config.yaml").read_text()
    ((rewritten,),) = alignpro.Rewriter.load(run).rewrite(["flip the word stone"])
    assert rewritten == alignpro.Rewriter.load(str(run.out)).rewrite(["flip the word stone"])[0][0]


def test_a_run_with_a_function_that_has_no_address_is_resumed_with_it(workshop: Workshop, tmp_path: Path) -> None:
    def local(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return brevity(prompts, responses)

    constant = {"optimizer": {"learning_rate": 0.01, "micro_batch_size": 4}}
    run = alignpro.train(configuration(workshop, tmp_path / "run", local, steps=2) | constant)
    assert "reward/local" in run.metrics[0]
    written = (run.out / "config.yaml").read_text()
    assert "not importable, give the function again: " in written
    with pytest.raises(ConfigError, match=r"local: was given from Python, where no configuration file can name it"):
        alignpro.train([run.out / "config.yaml", f"run.out={tmp_path}/other"])
    longer = configuration(workshop, tmp_path / "run", local, steps=4) | constant
    assert alignpro.train(longer, resume=True).metrics[: len(run.metrics)] == run.metrics
    alignpro.train(configuration(workshop, tmp_path / "whole", local, steps=4) | constant)
    assert_same(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(AlignProError, match=r"the configuration differs .*reward\.components"):
        alignpro.train(configuration(workshop, tmp_path / "run", brevity, steps=5) | constant, resume=True)


@pytest.mark.parametrize("function", [lambda prompts: [], Workshop])
def test_a_function_that_cannot_be_called_as_a_reward_is_an_error(
    workshop: Workshop, tmp_path: Path, function: Any
) -> None:
    with pytest.raises(ConfigError, match=r"reward function .*: it is called as fn\(prompts, responses, \*\*params\)"):
        alignpro.train(configuration(workshop, tmp_path / "run", function))


def test_a_configuration_has_one_of_several_forms(workshop: Workshop, tmp_path: Path) -> None:
    command, *arguments = workshop.arguments("rlhf", tmp_path / "files")
    run = alignpro.train(arguments, job="rlhf")
    alignpro.train(load_config(RLHFConfig, [arguments[0], f"run.out={tmp_path}/typed"]))
    assert_same(run.out, tmp_path / "typed")
    assert workshop.run(command, tmp_path / "command") == 0
    assert_same(run.out, tmp_path / "command")
    path = tmp_path / "sft.yaml"
    path.write_text(f"run: {{out: {tmp_path}/sft, steps: 1, tensorboard: false}}\n")
    sft = load_config(SFTConfig, [str(workshop.root / "sft.yaml"), str(path)])
    assert steps_of_checkpoints(alignpro.train(sft).out) == [1]
    with pytest.raises(ConfigError, match="expected a EvalConfig, got a SFTConfig"):
        alignpro.evaluate(sft)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="job='dpo': expected train, rlhf, sft, reward"):
        alignpro.train(path, job="dpo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="data: missing"):
        alignpro.train(path)


def test_the_bars_of_transformers_are_hidden_and_the_users_settings_kept(
    finished: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    before = transformers_logging.is_progress_bar_enabled()
    transformers_logging.enable_progress_bar()
    try:
        alignpro.Rewriter.load(finished("sft"))
        assert "Loading weights" not in capfd.readouterr().err
        assert transformers_logging.is_progress_bar_enabled()
        load_language_model(ModelConfig(path=str(finished("sft") / "model"), device="cpu"))
        assert "Loading weights" in capfd.readouterr().err
    finally:
        if not before:
            transformers_logging.disable_progress_bar()


def test_a_run_goes_back_to_a_step(workshop: Workshop, tmp_path: Path) -> None:
    config = load_config(TrainConfig, workshop.arguments("train", tmp_path / "run")[1:])
    first = read_metrics(alignpro.train(config).out)
    assert read_metrics(alignpro.train(config, resume=True, from_step=1).out) == first
    assert alignpro.train(config, resume=True).finished
    with pytest.raises(ConfigError, match="requires resume=True"):
        alignpro.train(config, from_step=1)
