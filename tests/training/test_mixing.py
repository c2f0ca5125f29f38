"""`alignpro mix`: which runs it takes, what it writes, and what can be done with that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from finished_runs import finished_run
from tiny_models import apply_head

from alignpro.cli import main
from alignpro.config import ModelConfig
from alignpro.data import Prompt
from alignpro.demo.world import prompt_records, write_records
from alignpro.environments.rewriter import Rewriter
from alignpro.errors import AlignProError, ConfigError, ModelError, TrainingError
from alignpro.models.loading import load_language_model
from alignpro.models.mixed_model import MixedModel
from alignpro.models.sequences import SequenceBatch
from alignpro.training.mixed_runs import check_weights
from alignpro.training.mixing import SUMMARY_FILE, mix
from alignpro.training.mixture_weights import equal_shares
from alignpro.training.model_destination import model_of
from alignpro.training.model_files import export_model

Directory = Callable[[str], Path]
BATCH = SequenceBatch.build([[5, 17, 3]], [[8, 2, 4]])


def two_runs(out: Path, models: Directory, kind: str = "full") -> list[Path]:
    """Write two runs that differ in what they learned alone."""
    write_records(out / "prompts.jsonl", prompt_records(12, 0, heldout=False))
    data = {"source": str(out / "prompts.jsonl"), "holdout": 0}
    for name in ("short", "polite"):
        finished_run(out / name, models, kind, seed=len(name), data=data)
    return [out / "short", out / "polite"]


def change(run: Path, key: str, value: object) -> Path:
    """Change a key of a run's configuration."""
    file = run / "config.yaml"
    content = section = yaml.safe_load(file.read_text())
    *path, last = key.split(".")
    for part in path:
        section = section[part]
    section[last] = value
    file.write_text(yaml.safe_dump(content))
    return run


def load(directory: Path) -> torch.nn.Module:
    return load_language_model(ModelConfig(path=str(directory / "model"), device="cpu"))


@torch.no_grad()
def logits(directory: Path) -> torch.Tensor:
    model = load(directory)
    return apply_head(model, model.action_states(BATCH))


def test_the_mixture_is_a_run_directory_whose_logits_are_the_weighted_sum(
    model_directory: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, out = two_runs(tmp_path, model_directory), tmp_path / "mixed"
    sizes = ["--prompts", "3", "--rewrites", "4"]
    with pytest.raises(SystemExit, match="0"):
        main(["mix", *map(str, runs), "--out", str(out), "--weights", "0.25,0.75", *sizes])
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("[")]  # libraries' own
    assert [line[:5] for line in printed[:2]] == ["0.250", "0.750"] and printed[-1] == str(out)
    assert printed[2].startswith("token by token, against whole rewrites: TV 0.")
    torch.testing.assert_close(logits(out), 0.25 * logits(runs[0]) + 0.75 * logits(runs[1]), rtol=1e-5, atol=1e-5)
    half = Rewriter.load(out, strength=0.5).engine.models["policy"]
    assert isinstance(half, MixedModel) and half.weights == (0.125, 0.375, 0.5)
    assert len(Rewriter.load(out).rewrite(["flip the word stone pls"], n=2, temperature=1.0, candidates=4)[0]) == 2
    with pytest.raises(
        ModelError, match="is neither trained nor exported: name one of its prompters, or write one model"
    ):
        export_model(model_of(out), tmp_path / "both.gguf")
    summary = json.loads((out / SUMMARY_FILE).read_text())
    assert summary["weights_by"] == "given" and summary["F"] < 0 < summary["effective_sample_size"] <= 4


@pytest.mark.slow
def test_max_min_weights_even_out_the_normalised_rewards(model_directory: Directory, tmp_path: Path) -> None:
    runs = two_runs(tmp_path, model_directory)
    found = mix(runs, tmp_path / "mixed", max_min=True, prompts=4, rewrites=8)
    assert found["weights_by"] == "max_min" and sum(found["weights"]) == pytest.approx(1)
    equal = mix(runs, tmp_path / "equal", prompts=4, rewrites=8)
    assert equal["weights"] == [0.5, 0.5] and found["F"] <= equal["F"] + 1e-3
    apart = [abs(one - other) for one, other in (each["normalised_rewards"] for each in (found, equal))]
    assert apart[0] < apart[1] or found["weights"] == pytest.approx([0.5, 0.5], abs=0.05)


def test_loras_of_one_base_become_one_lora_which_is_said_to_approximate(
    model_directory: Directory, tmp_path: Path
) -> None:
    """Its change of each weight is the weighted sum of theirs; in the mixture of logits, the base is held once."""
    runs, out = two_runs(tmp_path, model_directory, "lora"), tmp_path / "one"
    found = mix(runs, out, weights=[0.25, 0.75], one_model=True, prompts=1, rewrites=2)
    assert found["gap_of_one_model"]["kl"] > 0
    changes = []
    for directory in (*runs, out):
        adapted = load(directory)
        before = adapted.without_adapter().causal
        merged = {name: m.get_delta_weight("default") for name, m in before.named_modules() if hasattr(m, "lora_A")}
        changes.append(merged)
    assert changes[2]
    for name, change_of_one in changes[2].items():
        torch.testing.assert_close(change_of_one, 0.25 * changes[0][name] + 0.75 * changes[1][name])
    mix(runs, tmp_path / "mixed", prompts=1, rewrites=2)
    mixture = load(tmp_path / "mixed")
    assert isinstance(mixture, MixedModel)
    assert mixture.parts[0].head.shares_storage_with(mixture.parts[1].head)


REFUSED = {
    "objective.kl.coef": (
        0.2,
        r"polite: objective.kl.coef=0.2, but .*short has 0.05: a mixture needs runs that differ in",
    ),
    "objective.kl.target": (3.0, r"polite: objective.kl.target=3: .*their λ, which must be fixed"),
    "prompting.meta_prompt": ("rewrite", r"polite: prompting.meta_prompt=rewrite, but .*short has none"),
    "prompting.form": ("addition", r"polite: prompting.form=addition, but .*short has whole"),
    "memory": ({}, r"polite: its prompter was trained with a `memory` of its own: prompters that see different"),
    "policy.reference": (
        "llama",
        r"polite: its reference is .*llama.*, that of .*short is .*qwen2.*, with other weights",
    ),
}


def test_runs_that_differ_in_more_than_their_rewards_are_refused(model_directory: Directory, tmp_path: Path) -> None:
    runs = two_runs(tmp_path, model_directory)
    config = runs[1] / "config.yaml"
    before = config.read_text()
    for key, (value, message) in REFUSED.items():
        change(runs[1], key, str(model_directory("llama")) if value == "llama" else value)
        with pytest.raises(AlignProError, match=message) as caught:
            mix(runs, tmp_path / "mixed")
        assert "\n" not in str(caught.value) and not (tmp_path / "mixed").exists()
        config.write_text(before)
    template = runs[1] / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(ConfigError, match=r"polite/model has another chat template than .*short/model"):
        mix(runs, tmp_path / "mixed")
    with pytest.raises(ConfigError, match="mix: 1 run: give at least two"):
        mix(runs[:1], tmp_path / "mixed")
    template.write_text(template.read_text()[:-1])
    with pytest.raises(ModelError, match="only LoRAs of one base model become one model"):
        mix(runs, tmp_path / "mixed", one_model=True)
    assert not (tmp_path / "mixed").exists()


def test_weights_are_one_for_each_run_and_of_sum_one(tmp_path: Path) -> None:
    assert check_weights(None, 4) == [0.25] * 4
    with pytest.raises(ConfigError, match="1 weights for 2 runs"):
        check_weights([1.0], 2)
    with pytest.raises(ConfigError, match=r"weights 0\.5, 0\.6: expected numbers from 0, of sum 1"):
        check_weights([0.5, 0.6], 2)
    with pytest.raises(ConfigError, match="leave one of them out"):
        mix([tmp_path, tmp_path], tmp_path / "mixed", weights=[0.5, 0.5], max_min=True)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(TrainingError, match="already exists; choose another --out"):
        mix([tmp_path, tmp_path], tmp_path)


def test_prompts_of_several_runs_count_once_and_are_as_many_as_was_asked_for(
    model_directory: Directory, tmp_path: Path
) -> None:
    runs = two_runs(tmp_path, model_directory)  # of one file
    assert mix(runs, tmp_path / "mixed", prompts=8, rewrites=3)["prompts"] == 8
    assert mix(runs, tmp_path / "all", prompts=500, rewrites=3)["prompts"] < 500


def test_the_gap_is_of_as_many_rewrites_as_the_summary_says(model_directory: Directory, tmp_path: Path) -> None:
    """One of each model, if fewer were asked for; of a single model, all count."""
    runs = two_runs(tmp_path, model_directory)
    found = mix(runs, tmp_path / "mixed", weights=[1, 0], prompts=2, rewrites=2)
    assert found["rewrites"] == found["gap_to_whole_rewrites"]["effective_sample_size"] == 3


@pytest.mark.parametrize(("sizes", "shared", "count"), [((9, 9, 9), 0, 7), ((9, 2, 9), 0, 12), ((9, 9), 6, 10)])
def test_each_run_gives_an_equal_share_of_the_prompts(sizes: tuple[int, ...], shared: int, count: int) -> None:
    common = [Prompt.from_text(f"shared {i}") for i in range(shared)]
    sets = [[*common, *(Prompt.from_text(f"{k} {i}") for i in range(size - shared))] for k, size in enumerate(sizes)]
    chosen = {prompt.id for prompt in equal_shares(sets, count)}
    assert len(chosen) == count
    taken = [len(chosen & {prompt.id for prompt in each}) for each in sets if len(each) > 2]
    assert max(taken) - min(taken) <= 1


def test_a_mixture_is_read_from_any_directory(
    model_directory: Directory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference's path is in the runs' configurations as it was given, which may be from another directory."""
    runs, start = two_runs(tmp_path, model_directory), model_directory("qwen2")
    for run in runs:
        change(run, "policy.path", start.name)
    monkeypatch.chdir(start.parent)
    mix(runs, tmp_path / "mixed", prompts=1, rewrites=3)
    monkeypatch.chdir(tmp_path)
    half = Rewriter.load(tmp_path / "mixed", strength=0.5).engine.models["policy"]
    assert isinstance(half, MixedModel) and half.weights == (0.25, 0.25, 0.5)
