"""Tokenizers for all tests of prompting; do not modify them."""

import pytest
from example_tokenizers import bpe_tokenizer, char_tokenizer


@pytest.fixture(scope="module")
def llama():
    return char_tokenizer()


@pytest.fixture(scope="module")
def qwen():
    return bpe_tokenizer()
