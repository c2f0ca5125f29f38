"""Which tokens end a turn: those of the generation config, of the config, of the tokenizer and of the chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny, tiny_language_model

from alignpro.config import ModelConfig, PromptingConfig, SamplingConfig
from alignpro.data import Prompt
from alignpro.engine import Chain, Engine, SamplingParams
from alignpro.environments.base import truncated_samples
from alignpro.environments.build import prompt_environment
from alignpro.environments.response import ResponseEnvironment
from alignpro.models.language_model import LanguageModel
from alignpro.models.loading import load_language_model
from alignpro.models.sequences import SequenceBatch
from alignpro.policy.policy import Policy
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.rewards import RewardStack
from alignpro.targets.local import LocalTarget

PROMPT = Prompt.from_text("flip the word")
GREEDY = SamplingParams(max_tokens=20, temperature=0.0)


def fourth_greedy_token(model: LanguageModel) -> int:
    """Return the fourth token of a greedy continuation that runs on, which is none of the first three."""
    template = ChatTemplate(model.tokenizer)
    ((free,),) = Engine({"m": model}).generate("m", [template.encode(PROMPT.messages)], GREEDY)
    assert free.tokens[3] not in free.tokens[:3]
    return free.tokens[3]


def respond(model: LanguageModel) -> Chain:
    template = ChatTemplate(model.tokenizer, stop_token_ids=model.end_token_ids)
    environment = ResponseEnvironment(template, RewardStack([], []))
    return environment.rollout(Engine({"policy": model}), [PROMPT], GREEDY, [0])[0][0]


@pytest.mark.parametrize("place", ["generation_config", "config"])
def test_every_end_token_of_a_checkpoint_ends_a_turn(place: str, tmp_path: Path) -> None:
    config = ModelConfig(path=str(save_tiny("llama", tmp_path)), device="cpu")
    model = load_language_model(config)
    end = fourth_greedy_token(model)
    if place == "config":
        (tmp_path / "generation_config.json").unlink()
        model.causal.config.eos_token_id = [model.tokenizer.eos_token_id, end]
        model.causal.config.save_pretrained(tmp_path)
    else:
        model.causal.generation_config.eos_token_id = [model.tokenizer.eos_token_id, end]
        model.causal.generation_config.save_pretrained(tmp_path)
    loaded = load_language_model(config)
    assert loaded.end_token_ids == tuple(sorted({model.tokenizer.eos_token_id, end}))
    chain = respond(loaded)
    assert len(chain.sample.tokens) == 4
    assert chain.sample.tokens[-1] == end
    assert chain.sample.finish_reason == "stop"
    assert not truncated_samples([[chain]]).any()
    assert ChatTemplate(loaded.tokenizer, stop_token_ids=loaded.end_token_ids).decode(chain.sample.tokens) == (
        loaded.tokenizer.decode(chain.sample.tokens[:-1], skip_special_tokens=True).strip()
    )


def test_the_sampled_end_token_is_an_action() -> None:
    model = tiny_language_model("llama")
    model.causal.generation_config.eos_token_id = [fourth_greedy_token(model)]
    sample = respond(model).sample
    batch = SequenceBatch.build([ChatTemplate(model.tokenizer).encode(PROMPT.messages)], [sample.tokens])
    assert batch.actions[batch.mask].tolist() == sample.tokens
    assert torch.isfinite(Policy(model, model).token_stats(batch).logprob).all()


def test_ends_of_prompter_and_target_end_rewrites_and_responses() -> None:
    prompter, target = tiny_language_model("qwen2"), tiny_language_model("llama", seed=3)
    ends = {"prompter": 70, "target": 71}
    prompter.causal.generation_config.eos_token_id = ends["prompter"]
    target.causal.generation_config.eos_token_id = [ends["target"]]
    sampling = SamplingConfig(max_tokens=8)
    answering = LocalTarget.build(target, ModelConfig(path="t"), PromptingConfig(), sampling)
    environment = prompt_environment(prompter, answering, RewardStack([], []), PromptingConfig(), sampling, responses=1)
    assert ends["prompter"] in environment.prompter.stop_token_ids
    assert prompter.tokenizer.eos_token_id in environment.prompter.stop_token_ids
    assert ends["target"] in answering.template.stop_token_ids
    assert ends["prompter"] not in answering.template.stop_token_ids


def test_an_end_token_outside_the_vocabulary_is_left_out() -> None:
    model = tiny_language_model("llama")
    model.causal.config.eos_token_id = [model.vocabulary + 5]
    model.causal.generation_config.eos_token_id = None
    assert model.end_token_ids == (model.tokenizer.eos_token_id,)


def test_end_tokens_are_known_while_the_weights_are_sharded() -> None:
    model = tiny_language_model("llama")
    ends = model.end_token_ids
    for weight in model.parameters():
        weight.data = weight.data.new_empty(0)
    assert model.end_token_ids == ends == (model.tokenizer.eos_token_id,)
