"""A stop text may begin inside a token: the text before it belongs to the sequence."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignpro.engine import Engine, SamplingParams
from alignpro.engine.stopping import find_end
from alignpro.models.language_model import LanguageModel


def merging_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of eight tokens, of which two hold a full stop after other text."""
    vocabulary = {t: i for i, t in enumerate(["</s>", "a", "b", ".", "!", "b.", "a.!", "ab"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "."), ("a", "b")]))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer that writes a space before every text it encodes, and drops the first space it decodes."""
    pieces = ["</s>", "\u2581", *"abc.", "\u2581a", "b.", "c.a"]
    merges = [("\u2581", "a"), ("b", "."), ("c", "."), ("c.", "a")]
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*pieces, "c."])}, merges=merges))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def test_sampled_text_is_that_of_a_run_without_stop_texts_up_to_the_stop() -> None:
    tokenizer = merging_tokenizer()
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=8, max_position_embeddings=64, eos_token_id=0, **tiny)
    model = LanguageModel(LlamaForCausalLM(config).eval(), tokenizer, "m").requires_grad_(False)

    def draw(**settings):
        return Engine({"m": model}).generate("m", [[1]], SamplingParams(max_tokens=12, n=40, **settings))[0]

    inside = 0
    for free, cut in zip(draw(), draw(stop=(".",)), strict=True):
        assert tokenizer.decode(cut.text_tokens) == tokenizer.decode(free.tokens).split(".")[0]
        assert cut.tokens == free.tokens[: len(cut.tokens)]  # those that were sampled are unchanged
        assert len(cut.tokens) == len(cut.logprobs)
        inside += bool(cut.rest_tokens)
    assert inside > 10


@pytest.mark.parametrize(
    ("pieces", "stop", "text"),
    [
        (["a", "b."], ".", "ab"),
        (["ab", "."], ".", "ab"),
        (["a.!"], ".!", "a"),
        (["ab", "a.!"], "ba.", "a"),
        (["b."], "b", ""),
        (["ab", "ab", "b."], "b.", "abab"),
    ],
)
def test_text_before_a_stop_text(pieces: list[str], stop: str, text: str) -> None:
    tokenizer = merging_tokenizer()
    tokens = tokenizer.convert_tokens_to_ids(pieces)
    end = find_end(tokens, SamplingParams(stop=(stop,)), tokenizer)
    assert end is not None
    assert end.num_text_tokens is not None
    assert tokenizer.decode([*tokens[: end.num_text_tokens], *end.rest_tokens]) == text


@pytest.mark.parametrize(
    ("pieces", "text"),
    [(["\u2581a", "b."], "ab"), (["\u2581a", "c.a"], "ac"), (["\u2581a", "\u2581a", "c.a"], "a ac"), (["b."], "b")],
)
def test_no_space_is_added_before_the_rest_of_a_token(pieces: list[str], text: str) -> None:
    tokenizer = sentencepiece_tokenizer()
    tokens = tokenizer.convert_tokens_to_ids(pieces)
    end = find_end(tokens, SamplingParams(stop=(".",)), tokenizer)
    assert end is not None
    assert end.num_text_tokens is not None
    assert tokenizer.decode([*tokens[: end.num_text_tokens], *end.rest_tokens]) == text


def test_a_text_that_no_tokens_decode_to_is_an_error() -> None:
    vocabulary = {"</s>": 0, "x.": 1, "?": 2}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="?")
    with pytest.raises(ValueError, match=r"begins inside a token, and no tokens decode to the text before it \('x'\)"):
        find_end([1], SamplingParams(stop=(".",)), tokenizer)
