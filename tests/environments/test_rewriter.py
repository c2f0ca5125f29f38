"""Using a finished run: rewrites with the run's own templates, and the target's answers to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finished_runs import finished_run
from tiny_models import policy_config

from alignpro.data import Message, Prompt
from alignpro.engine import Engine, SamplingParams
from alignpro.environments.rewriter import Rewriter, Rewritten
from alignpro.errors import ModelError
from alignpro.models.loading import load_language_model
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.prompting.target_prompt import TargetTemplate

Directory = Callable[[str], Path]

TEXTS = ["flip the word stone pls", "sort these letters: dcba"]


@pytest.mark.parametrize("kind", ["full", "lora", "soft_prompt"])
def test_rewrites_with_the_trained_model_and_its_templates(
    kind: str, model_directory: Directory, tmp_path: Path
) -> None:
    meta_prompt = tmp_path / "meta.jinja"
    meta_prompt.write_text("Make it clear: {{ prompt }}")
    prompting = {"meta_prompt": str(meta_prompt)}
    config = finished_run(tmp_path, model_directory, kind, prompting=prompting)
    rewritten = Rewriter.load(tmp_path).rewrite(TEXTS)
    model = load_language_model(policy_config(tmp_path / "model"))
    template = PrompterTemplate(model.tokenizer, config.prompting)
    inputs = [template.encode(Prompt.from_text(text)) for text in TEXTS]
    params = SamplingParams(max_tokens=12, temperature=0.0, stop_token_ids=template.stop_token_ids)
    expected = Engine({"m": model}).generate("m", inputs, params)
    assert rewritten == [
        [Rewritten(template.decode(Prompt.from_text(text), c.text_tokens), None)]
        for text, (c,) in zip(TEXTS, expected, strict=True)
    ]


def test_the_target_answers_the_rewrite_greedily(model_directory: Directory, tmp_path: Path) -> None:
    finished_run(tmp_path, model_directory)
    groups = Rewriter.load(tmp_path, with_target=True).rewrite(TEXTS, n=2, temperature=1.0)
    target = load_language_model(policy_config(model_directory("llama")))
    template = TargetTemplate(target.tokenizer, max_tokens=target.context_length - 10)
    params = SamplingParams(max_tokens=10, temperature=0.0, stop_token_ids=template.stop_token_ids)
    for text, group in zip(TEXTS, groups, strict=True):
        for each in group:
            tokens = template.encode(Prompt.from_text(text), each.rewrite).tokens
            ((answer,),) = Engine({"m": target}).generate("m", [tokens], params)
            assert each.response == template.decode(answer.text_tokens)


def test_samples_differ_and_a_seed_repeats_them(model_directory: Directory, tmp_path: Path) -> None:
    finished_run(tmp_path, model_directory)
    rewriter = Rewriter.load(tmp_path)
    groups = rewriter.rewrite(TEXTS, n=4, temperature=1.0, seed=1)
    assert [len({each.rewrite for each in group}) for group in groups] == [4, 4]
    assert rewriter.rewrite(TEXTS, n=4, temperature=1.0, seed=1) == groups
    assert rewriter.rewrite(TEXTS, n=4, temperature=1.0, seed=2) != groups


def test_prompts_may_be_conversations(model_directory: Directory, tmp_path: Path) -> None:
    finished_run(tmp_path, model_directory)
    rewriter = Rewriter.load(tmp_path, with_target=True)
    turns = (Message("user", "hi"), Message("assistant", "hello"), Message("user", "and now?"))
    conversation, question = rewriter.rewrite([Prompt(turns), "and now?"])
    assert conversation != question
    assert question == rewriter.rewrite([Prompt.from_text("and now?")])[0]


def test_no_texts_give_no_rewrites(model_directory: Directory, tmp_path: Path) -> None:
    finished_run(tmp_path, model_directory)
    assert Rewriter.load(tmp_path, with_target=True).rewrite([]) == []


def test_a_prompt_that_does_not_fit_is_named(model_directory: Directory, tmp_path: Path) -> None:
    finished_run(tmp_path, model_directory)
    with pytest.raises(ModelError, match=r"prompt 'long long .*do not fit in the context of 128 tokens") as caught:
        Rewriter.load(tmp_path).rewrite([TEXTS[0], "long " * 50])
    assert str(caught.value).endswith(": shorten the prompt")  # not: keys that the command does not have


def test_a_failed_rewrite_is_an_error_and_not_an_empty_text(model_directory: Directory, tmp_path: Path) -> None:
    finished_run(tmp_path, model_directory)
    rewriter = Rewriter.load(tmp_path)
    model = rewriter.engine.models["policy"]
    (free,) = rewriter.rewrite(TEXTS[:1], n=4, temperature=1.0)
    first, *others = (set(model.tokenizer(one.rewrite).input_ids[:-1]) for one in free)
    bad = min(set().union(*others) - first - set(rewriter.prompter.encode(Prompt.from_text(TEXTS[0]))))

    def check(_: object, inputs: tuple[torch.Tensor]) -> None:
        if bad in inputs[0]:
            raise ValueError("poison")

    model.causal.get_input_embeddings().register_forward_pre_hook(check)
    with pytest.raises(ModelError, match=r"prompt 'flip the word .*raised ValueError: poison"):
        rewriter.rewrite(TEXTS[:1], n=4, temperature=1.0)


@pytest.mark.parametrize("missing", ["config.yaml", "model"])
def test_an_unfinished_run_is_an_error(missing: str, model_directory: Directory, tmp_path: Path) -> None:
    finished_run(tmp_path, model_directory)
    (tmp_path / missing).rename(tmp_path / "gone")
    with pytest.raises(ModelError, match="not a finished run of `alignpro train`"):
        Rewriter.load(tmp_path)


def test_the_chat_template_is_the_one_saved_with_the_model(model_directory: Directory, tmp_path: Path) -> None:
    """Not what the configuration names: a file may have changed or be gone, and `plain` depends on the tokenizer."""
    finished_run(tmp_path, model_directory)
    config = tmp_path / "config.yaml"
    kept = Rewriter.load(tmp_path).prompter.chat.template
    config.write_text(config.read_text().replace("policy:\n", "policy:\n  chat_template: gone.jinja\n", 1))
    lines = config.read_text().splitlines()
    again = [line for line in lines if line.startswith("  chat_template: null")]
    config.write_text("\n".join(line for line in lines if line not in again))
    assert Rewriter.load(tmp_path).prompter.chat.template == kept
