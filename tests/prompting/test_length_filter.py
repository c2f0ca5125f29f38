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
