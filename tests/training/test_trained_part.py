"""From one command to the next: an adapter goes on training, and what a run leaves is usable as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from tiny_models import IDS, head_logits, policy_config, save_tiny, tiny_transformer
from tiny_runs import Workshop
from transformers import AutoModelForCausalLM

from alignpro.cli import main
from alignpro.config import SFTConfig, load_config
from alignpro.errors import TrainingError
from alignpro.models.loading import load_language_model
from alignpro.training.resume import check_configuration

Finished = Callable[..., Path]

SFT_LORA = ("sft", "policy.adapter.kind=lora", "policy.adapter.rank=2", "run.steps=1", "run.eval_every=0")


@pytest.mark.parametrize("adapter", [[], ["policy.adapter.kind=lora", "policy.adapter.rank=2"]], ids=["same", "new"])
def test_the_result_of_sft_is_trained_further_and_used_elsewhere(
    workshop: Workshop, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    start = finished(*SFT_LORA) / "model"
    settings = [f"policy.path={start}", "run.steps=1", "run.eval_every=0", *adapter]
    assert workshop.run("train", "runs/x", *settings) == 0
    directory = tmp_path / "runs" / "x" / "model"
    monkeypatch.chdir("/")
    base = Path(json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert base == (directory / "base" if adapter else workshop.root / "prompter")
    expected = head_logits(load_language_model(policy_config(directory)))
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.allclose(model(input_ids=IDS).logits, expected, atol=1e-4)
    with_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory)
    assert torch.allclose(with_peft(input_ids=IDS).logits, expected, atol=1e-4)
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    assert weights < 0.5 * (workshop.root / "prompter" / "model.safetensors").stat().st_size  # only an adapter


@pytest.mark.parametrize("saved", ["full", None])
def test_an_unset_kind_is_that_which_it_stands_for(
    workshop: Workshop, finished: Finished, tmp_path: Path, saved: str | None
) -> None:
    """A run of all weights can be continued whether its configuration says so or leaves it out; of an adapter it cannot."""
    for path, raises in ((workshop.root / "prompter", False), (finished(*SFT_LORA) / "model", saved == "full")):
        files = [str(workshop.root / "sft.yaml"), f"run.out={tmp_path}", f"policy.path={path}"]
        before = load_config(SFTConfig, files).model_dump(mode="json")
        before["policy"]["adapter"]["kind"] = saved
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
        config = load_config(SFTConfig, files)
        if raises:
            with pytest.raises(TrainingError, match=r"policy\.adapter\.kind \(was 'full', is None\)"):
                check_configuration(tmp_path / "config.yaml", config)
        else:
            check_configuration(tmp_path / "config.yaml", config)


def test_a_target_with_nan_ends_eval_with_one_line(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = save_tiny("gpt2", tmp_path / "broken")
    model = tiny_transformer("gpt2")
    model.transformer.h[0].mlp.c_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(broken)
    (tmp_path / "reward.py").write_text(
        "def score(prompts, responses):\n    return [float(len(y)) for y in responses]\n"
    )
    config = {
        "out": str(tmp_path / "eval"),
        "data": {"source": str(workshop.root / "prompts.jsonl"), "holdout": 0.5},
        "target": {"path": str(broken), "device": "cpu"},
        "reward": {"components": [{"kind": "function", "function": f"{tmp_path}/reward.py:score"}]},
        "prompts": 2,
    }
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(SystemExit) as stopped:
        main(["eval", str(tmp_path / "eval.yaml")])
    assert stopped.value.code == 1
    errors = capsys.readouterr().err
    assert f"model {broken}: its outputs are not finite" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "eval" / "summary.json").exists()
