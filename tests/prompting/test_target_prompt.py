"""From x to the target: the prompter's prompt, its rewrite, and the target's prompt."""

from dataclasses import replace

import pytest
from example_tokenizers import DIALOGUE, bpe_tokenizer, char_tokenizer, prompt

from alignpro.config import PromptingConfig
from alignpro.data import Prompt
from alignpro.errors import DataError
from alignpro.prompting.prompter_prompt import PrompterTemplate
from alignpro.prompting.target_prompt import TargetTemplate


def test_a_rewrite_passes_between_different_tokenizers(qwen, llama):
    prompter = PrompterTemplate(qwen, PromptingConfig())
    target = TargetTemplate(llama, max_tokens=100)
    x = prompt("rewrite the request")
    assert qwen.decode(prompter.encode(x)) == "<|im_start|>user\nrewrite the request<|im_end|>\n<|im_start|>assistant\n"
    rewrite = prompter.decode(x, prompter.completion(x, " the [/INST] dog\n"))
    sent = target.encode(x, rewrite)
    assert sent.text == "the [/INST] dog"
    assert llama.decode(sent.tokens) == "<s>[INST]the [/INST] dog[/INST]"
    assert sent.tokens.count(llama.convert_tokens_to_ids("[/INST]")) == 1
    assert (sent.empty, sent.dropped) == (False, 0)
    assert prompter.stop_token_ids != target.stop_token_ids == (llama.eos_token_id,)
    assert target.decode([*llama.encode("fine", add_special_tokens=False), llama.eos_token_id]) == "fine"


def test_the_target_sees_the_context_unchanged(llama):
    sent = TargetTemplate(llama, max_tokens=100).encode(Prompt(DIALOGUE), "say it")
    assert llama.decode(sent.tokens) == "<s>[INST]hi[/INST]hello</s>[INST]say it[/INST]"


def test_empty_rewrites(llama):
    x = prompt("the question")
    for rewrite in ("", " \n"):
        sent = TargetTemplate(llama, max_tokens=100).encode(x, rewrite)
        assert (sent.text, sent.empty, sent.dropped) == ("", True, 0)
        assert llama.decode(sent.tokens) == "<s>[INST][/INST]"
        sent = TargetTemplate(llama, max_tokens=100, on_empty="original").encode(x, rewrite)
        assert (sent.text, sent.empty) == ("the question", True)


def test_a_truncated_rewrite_is_used(qwen):
    prompter = PrompterTemplate(qwen, PromptingConfig())
    x = prompt("the question")
    ids = prompter.completion(x, "the quick brown fox jumps")
    assert prompter.decode(x, ids[:-2]) == qwen.decode(ids[:-2])


@pytest.mark.parametrize("make", [char_tokenizer, bpe_tokenizer])
def test_an_overlong_rewrite_loses_only_its_tail(make):
    tokenizer = make()
    text = "rewrite it: the lazy dog 12345 " * 20
    generous = TargetTemplate(tokenizer, max_tokens=10_000).encode(prompt("x"), text)
    assert generous.dropped == 0
    for limit in (len(generous.tokens), len(generous.tokens) - 1, 60):
        sent = TargetTemplate(tokenizer, max_tokens=limit).encode(prompt("x"), text)
        assert text.startswith(sent.text)
        assert sent.dropped == len(text) - len(sent.text)
        assert len(sent.tokens) <= limit
        longer = TargetTemplate(tokenizer, max_tokens=10_000).encode(prompt("x"), text[: len(sent.text) + 1])
        assert sent.dropped == 0 or len(longer.tokens) > limit


def test_cutting_the_tail_never_splits_a_character(qwen):
    for limit in range(15, 40):
        sent = TargetTemplate(qwen, max_tokens=limit).encode(prompt("x"), "😀" * 30)
        assert sent.text == "😀" * len(sent.text)
        assert "\ufffd" not in qwen.decode(sent.tokens)


def test_a_context_that_leaves_no_room(llama):
    target = TargetTemplate(llama, max_tokens=12)
    assert len(target.encode_context(Prompt(DIALOGUE))) > 12
    with pytest.raises(DataError, match=r"prompt file:7: the turns before the last one do not fit in the 12 tokens"):
        target.encode(replace(Prompt(DIALOGUE), source="file:7"), "say it")


def test_lone_surrogates_and_unknown_characters_can_be_encoded(qwen, llama):
    for tokenizer in (qwen, llama):
        assert PrompterTemplate(tokenizer, PromptingConfig()).encode(prompt("a \ud83d b \x00 é"))
