"""A run with a memory: what it remembers, what its models see, that it resumes bit for bit, and what stops it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_runs import Workshop, assert_same, read_metrics

from alignpro.config import MemoryConfig, TrainConfig, load_config
from alignpro.data import Prompt
from alignpro.distributed.ranks import Ranks
from alignpro.environments.base import Scores
from alignpro.errors import CheckpointError, TrainingError
from alignpro.prompting.memory import FILE_NAME, Memory
from alignpro.prompting.memory_context import MemoryContext
from alignpro.prompting.memory_template import MemoryTemplate, PastRewrite
from alignpro.training.builders import prompter_training
from alignpro.training.loggers.jsonl import read_rows
from alignpro.training.reinforcement import RLTrainer
from alignpro.training.rng_state import get_rng_state, set_rng_state
from alignpro.training.step_memory import StepMemory

Finished = Callable[..., Path]

SHORT = "{% for each in best %}+{{ each.rewrite }} {% endfor %}{% for each in worst %}-{{ each.rewrite }} {% endfor %}"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return overrides that switch on a memory which fits in the context of a tiny model."""
    template = tmp_path_factory.mktemp("template") / "short.jinja"
    template.write_text(SHORT + "{{ request }}")
    return [f"memory.template={template}", "memory.similar=2", "optimizer.schedule=constant"]


def trainer(workshop: Workshop, out: Path, *overrides: str) -> RLTrainer:
    out.mkdir()
    given = [str(workshop.root / "train.yaml"), f"run.out={out}", *overrides]
    return prompter_training(load_config(TrainConfig, given))


def test_policy_and_reference_see_what_is_remembered_and_a_checkpoint_keeps_it(
    workshop: Workshop, settings: list[str], tmp_path: Path
) -> None:
    """Without learning, policy and reference stay equal: their KL is 0 up to rounding, which depends on the processor's BLAS, and
    training sees the inputs of sampling."""
    still = [*settings, "optimizer.learning_rate=1e-12", "optimizer.warmup_steps=0", "run.eval_prompts=64"]
    made = trainer(workshop, tmp_path / "run", *still)
    rows = [made.step(step) for step in range(2)]
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    state, rng_state = made.save(checkpoint), get_rng_state()
    rows.append(made.step(2))
    assert [row["memory/prompts"] for row in rows] == [2, 4, 6]
    assert rows[0]["memory/shown"] == 0 and rows[2]["memory/shown"] > 0
    assert all(abs(row["kl"]) < 1e-6 and row["sample/logprob_difference_max"] < 1e-4 for row in rows)

    assert made.memory is not None
    memory = made.memory.memory
    before = memory.dumps()
    assert made.evaluate(2).metrics["eval/kl"] < 1e-6
    assert memory.dumps() == before  # what is evaluated is not remembered
    assert {each.prompt for each in memory.rewrites} <= {each.text for each in made.stream.prompts}
    assert made.heldout and not any(memory.holds(each) for each in made.heldout)
    for row in read_rows(tmp_path / "run" / "samples.jsonl"):  # a sample of each step; of two, both are kept
        kept = {(each.prompt, each.rewrite): each for each in memory.rewrites}
        if row["sample"].strip():
            each = kept[row["prompt"], row["sample"]]
            assert each.step == row["step"] and (each.count > 1 or each.reward == row["value"])
    (tmp_path / "model").mkdir()
    made.export(tmp_path / "model")
    assert (tmp_path / "model" / FILE_NAME).read_bytes() == (tmp_path / "run" / FILE_NAME).read_bytes() == before
    assert "## Memory" in (tmp_path / "model" / "README.md").read_text()

    again = trainer(workshop, tmp_path / "again", *still)
    again.load(checkpoint, state)
    set_rng_state(rng_state)
    assert again.step(2)["reward/mean"] == rows[2]["reward/mean"]
    assert again.memory is not None and again.memory.memory.dumps() == before


@pytest.mark.slow
def test_a_resumed_run_ends_as_the_undisturbed_one(
    workshop: Workshop, finished: Finished, settings: list[str], tmp_path: Path
) -> None:
    reference, out = finished("train", *settings), tmp_path / "run"
    assert workshop.run("train", out, *settings, "run.steps=2") == 0
    (out / FILE_NAME).unlink()
    assert workshop.run("train", out, *settings, "--resume") == 0
    assert_same(out, reference)
    for place in ("", "model", "checkpoints/step_000003"):
        assert (out / place / FILE_NAME).read_bytes() == (reference / place / FILE_NAME).read_bytes()
    assert max(row.get("memory/shown", 0) for row in read_metrics(out)) > 0


def step_memory(out: Path, source: str = "{{ request }}") -> StepMemory:
    return StepMemory(Ranks(), MemoryContext(Memory(MemoryConfig(), MemoryTemplate(source, "mine")), 100), out)


def test_a_memory_that_cannot_be_written_or_continued_is_an_error(tmp_path: Path) -> None:
    prompt, scores = Prompt.from_text("x"), Scores(torch.tensor([[0.5]]), [["y"]])
    with pytest.raises(
        TrainingError, match=r"nowhere/memory\.jsonl: cannot be written: .*continue from the last checkp"
    ):
        step_memory(tmp_path / "nowhere").add(0, [prompt], [0], [prompt], scores)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    with pytest.raises(CheckpointError, match=r"has no memory\.jsonl: start a new run"):
        step_memory(tmp_path).load(checkpoint)
    made = step_memory(tmp_path)
    made.add(0, [prompt], [0], [prompt], scores)
    made.save(checkpoint)
    with pytest.raises(
        CheckpointError, match=r"checkpoint: memory\.template is not what this run started with: restore"
    ):
        step_memory(tmp_path, "{{ request }}!").load(checkpoint)
    again = step_memory(tmp_path)
    again.load(checkpoint)
    assert again.memory.rewrites == [PastRewrite("x", "y", 0.5, 1)]


def test_a_new_run_begins_without_what_another_remembers(
    workshop: Workshop, settings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = tmp_path / "start"
    shutil.copytree(workshop.root / "prompter", start)
    memory = Memory(MemoryConfig())
    memory.add(1, [Prompt.from_text("x")], [["y"]], [[0.5]])
    (start / FILE_NAME).write_bytes(memory.dumps())
    made = trainer(workshop, tmp_path / "run", f"policy.path={start}", *settings)
    assert made.memory is not None and len(made.memory.memory) == 0
    assert "was trained with a memory of past rewrites, which is not used: this run begins without any" in caplog.text
