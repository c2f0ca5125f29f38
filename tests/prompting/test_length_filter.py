"""Prompts that are too long are left out and counted."""

import logging

import pytest
from example_tokenizers import prompt

from alignpro.config import PromptingConfig
from alignpro.data import Message
from alignpro.errors import DataError
from alignpro.prompting.length_filter import filter_overlong_prompts
from alignpro.prompting.prompter_prompt import PrompterTemplate


def test_long_prompts_are_dropped_and_counted(qwen, llama, caplog):
    encode = PrompterTemplate(qwen, PromptingConfig()).encode
    short, long = prompt("fox"), prompt("quick brown " * 100)
    with caplog.at_level(logging.WARNING):
        assert filter_overlong_prompts([short, long], encode, 50) == [short]
    assert "1 of 2 prompts do not fit in the 50 tokens of the policy's input" in caplog.text
    assert "file:7: " in caplog.text
    exact = len(encode(short))
    assert filter_overlong_prompts([short], encode, exact) == [short]
    with pytest.raises(
        DataError, match=rf"1 of 1 prompts do not fit in the {exact - 1} tokens.*file:7: {exact} tokens"
    ):
        filter_overlong_prompts([short], encode, exact - 1)
    refused = prompt("x", Message("system", "s"))
    assert filter_overlong_prompts([short, refused], PrompterTemplate(llama, PromptingConfig()).encode, 50) == [short]
    assert filter_overlong_prompts([], encode, 50) == []


def test_refusals_of_the_template_are_not_a_matter_of_length(llama, caplog):
    encode = PrompterTemplate(llama, PromptingConfig()).encode
    refused = [prompt("x", Message("system", "s")) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        assert filter_overlong_prompts([*refused, prompt("y"), prompt("long " * 50)], encode, 50) == [prompt("y")]
    first, second = caplog.messages
    assert first.startswith("2 of 4 prompts cannot be the policy's input (the first: file:7: ")
    assert "its chat template refuses a conversation of system, user: system turns are not supported" in first
    assert "tokens" not in first
    assert second.startswith("1 of 4 prompts do not fit in the 50 tokens of the policy's input (the first: file:7: ")
    with pytest.raises(
        DataError, match=r"no prompt is left: 2 of 2 prompts cannot be .*use another chat_template"
    ) as error:
        filter_overlong_prompts(refused, encode, 50)
    assert "max_prompt_tokens" not in str(error.value)
