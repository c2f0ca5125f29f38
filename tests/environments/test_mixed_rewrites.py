"""Rewrites of a prompter at other strengths, and of mixtures, token by token and over whole sequences."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finished_runs import finished_run
from test_rewriter import TEXTS
from tiny_models import apply_head, policy_config, tiny_language_model

from alignpro.cli import main
from alignpro.config import SFTConfig, dump_config
from alignpro.engine import Completion, Engine, SamplingParams
from alignpro.environments.exact_mixture import correct_draws, group_logprobs, resample
from alignpro.environments.rewriter import Rewriter
from alignpro.errors import ConfigError, ModelError
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model
from alignpro.models.mixed_model import MixedModel, mix_models
from alignpro.models.sequences import SequenceBatch
from alignpro.theory import enumerate_sequences, mixture_policy, total_variation

Directory = Callable[[str], Path]


def test_strength_leads_from_the_prompter_before_training_to_the_trained_one(
    model_directory: Directory, tmp_path: Path
) -> None:
    """Of a LoRA: the reference is the model below it; other runs name theirs, as in the test of candidates."""
    config = finished_run(tmp_path, model_directory, "lora")
    trained = Rewriter.load(tmp_path)
    before = Rewriter(load_language_model(policy_config(model_directory("qwen2"))), None, config)
    assert Rewriter.load(tmp_path, strength=0.0).rewrite(TEXTS) == before.rewrite(TEXTS)
    half = Rewriter.load(tmp_path, strength=0.5)
    mixture = half.engine.models["policy"]
    assert isinstance(mixture, MixedModel) and mixture.weights == (0.5, 0.5)
    batch = SequenceBatch.build([[5, 17, 3]], [[8, 2, 4]])
    models = (trained.engine.models["policy"], before.engine.models["policy"])
    with torch.no_grad():
        found, *of_each = (apply_head(model, model.action_states(batch)) for model in (mixture, *models))
    torch.testing.assert_close(found, sum(of_each) / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [float("nan"), -0.1, 2.5])
def test_a_strength_is_from_0_to_2(model_directory: Directory, tmp_path: Path, strength: float) -> None:
    """NaN was taken as 1."""
    finished_run(tmp_path, model_directory)
    with pytest.raises(ConfigError, match=r"strength=(nan|-0\.1|2\.5): expected a number from 0"):
        Rewriter.load(tmp_path, strength=strength)


def test_a_run_without_a_reference_has_no_strength(model_directory: Directory, tmp_path: Path) -> None:
    config = finished_run(tmp_path, model_directory)
    sft = SFTConfig.model_validate(
        {"run": {"out": tmp_path}, "data": {"source": "x"}, "policy": config.policy.model_dump()}
    )
    (tmp_path / "config.yaml").write_text(dump_config(sft))
    with pytest.raises(ModelError, match="is a run of `alignpro sft`, whose prompter is a reference and has none"):
        Rewriter.load(tmp_path, strength=0.5)


def test_candidates_correct_a_mixture_and_nothing_else(
    model_directory: Directory, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    finished_run(tmp_path, model_directory)
    half = Rewriter.load(tmp_path, strength=0.5)
    with caplog.at_level(logging.WARNING, logger="alignpro"):
        groups = half.rewrite(TEXTS, n=2, temperature=1.0, seed=1, candidates=8)
    assert "token-wise mixture against whole sequences: TV 0." in caplog.text and "of 8 candidates count" in caplog.text
    assert half.rewrite(TEXTS, n=2, temperature=1.0, seed=1, candidates=8) == groups
    drawn = half.rewrite(TEXTS, n=8, temperature=1.0, seed=1)
    for kept, candidates in zip(groups, drawn, strict=True):
        assert len(kept) == 2 and {each.rewrite for each in kept} <= {each.rewrite for each in candidates}
    given = ["--strength", "0.5", "--n", "2", "--temperature", "1", "--seed", "1", "--candidates", "8"]
    with pytest.raises(SystemExit, match="0"):
        main(["rewrite", *TEXTS, "--run", str(tmp_path), *given])
    pairs = [(text, each.rewrite) for text, group in zip(TEXTS, groups, strict=True) for each in group]
    assert "".join(f"{text}\t{rewrite}\n" for text, rewrite in pairs) in capsys.readouterr().out
    with pytest.raises(ConfigError, match="4 rewrites of 2 candidates: some would be given twice"):
        half.rewrite(TEXTS, n=4, temperature=1.0, candidates=2)
    with pytest.raises(ConfigError, match="set a temperature above 0"):
        half.rewrite(TEXTS, candidates=8)
    with pytest.raises(ConfigError, match="is a single one, whose samples are exact"):
        Rewriter.load(tmp_path).rewrite(TEXTS, temperature=1.0, candidates=8)


def test_corrected_samples_of_the_engine_are_those_of_the_mixture_over_whole_sequences() -> None:
    """In a world of five tokens and at most two steps, whose 21 sequences are enumerated."""
    space, prompt = enumerate_sequences(vocabulary=5, end_token=0, max_length=2), [1, 2]
    one, other, reference = (
        tiny_language_model("llama", vocab_size=5, seed=seed, initializer_range=0.2, pad_token_id=None)
        for seed in (1, 2, 3)
    )
    mixture = mix_models([one, other], [0.9, 0.6], reference, "mixture")  # of ρ_sft, the weight −.5
    assert isinstance(mixture, MixedModel)
    whole = [sequence_logprobs(model, prompt, space.sequences) for model in (one, other, reference)]
    exact = mixture_policy(whole[2], torch.stack(whole[:2]), torch.tensor([0.9, 0.6], dtype=torch.float64))
    tokenwise = sequence_logprobs(mixture, prompt, space.sequences)
    assert total_variation(exact, tokenwise) > 0.05
    params = SamplingParams(n=9000, max_tokens=2, stop_token_ids=(0,))
    groups = Engine({"m": mixture}).generate("m", [prompt], params)
    found = correct_draws(mixture, [prompt], groups, 1.0)
    place = {tuple(sequence): i for i, sequence in enumerate(space.sequences)}
    drawn = torch.tensor([place[tuple(completion.tokens)] for completion in groups[0]])
    law = torch.zeros_like(exact).index_add_(0, drawn, found.weights[0])
    assert total_variation(exact, law.log()) < 0.02
    assert found.total_variation.item() == pytest.approx(total_variation(exact, tokenwise).item(), abs=0.02)
    kept = resample(found, 4, [7])
    assert kept == resample(found, 4, [7]) and len(kept[0]) == 4


def sequence_logprobs(model: LanguageModel, prompt: list[int], sequences: list[list[int]]) -> torch.Tensor:
    """Return log p of all sequences, (S,), from the next-token distributions of each prefix; they sum to 1."""
    group = [Completion(tokens, [], "stop") for tokens in sequences]
    found = group_logprobs(model, [prompt], [group], 1.0)[0]
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    return found
