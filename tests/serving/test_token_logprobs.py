"""Log-probabilities of a model in this process, in OpenAI's form: the model's own, token by token, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from test_rewriting_local_target import CHAT, COMPLETION, read, request, send, with_target
from tiny_models import tiny_language_model
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from alignpro.data import Message
from alignpro.models.language_model import LanguageModel
from alignpro.prompting.chat_template import ChatTemplate
from alignpro.serving.engine_thread import EngineThread
from alignpro.serving.local_target import LocalServedTarget
from alignpro.serving.token_logprobs import TokenTexts

PATHS = ["/chat/completions", "/completions"]


def expected(model: LanguageModel, prompt: list[int], tokens: list[str]) -> list[torch.Tensor]:
    """The log-probabilities at the positions of an answer's tokens by a pass of transformers."""
    ids = model.tokenizer.convert_tokens_to_ids(tokens)
    with torch.no_grad():
        logits = model.causal(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return [row[token] for row, token in zip(logits.log_softmax(-1), ids, strict=True)]


def shown(model: LanguageModel, tokens: list[str]) -> str:
    """The text of tokens, which leaves special ones out."""
    return "".join(token for token in tokens if token not in model.tokenizer.all_special_tokens)


def test_a_chats_are_those_of_a_forward_pass(llama: LanguageModel) -> None:
    """Those of the model, whatever the temperature is."""
    body = CHAT | {"logprobs": True, "top_logprobs": 3, "temperature": 0.8, "top_p": 0.9}
    for temperature in (0.0, 0.8):
        _, answer = send(llama, body | {"temperature": temperature})
        (choice,) = ChatCompletion.model_validate(answer).choices
        assert choice.logprobs is not None and choice.logprobs.content
        content = choice.logprobs.content
        assert shown(llama, [each.token for each in content]).strip() == choice.message.content
        prompt = ChatTemplate(llama.tokenizer, stop_token_ids=llama.end_token_ids).encode([Message("user", "hi")])
        values = expected(llama, prompt, [each.token for each in content])
        assert [each.logprob for each in content] == pytest.approx([float(value) for value in values], abs=1e-4)
        for each in content:
            assert each.bytes == list(each.token.encode())
            likeliest = [other.logprob for other in each.top_logprobs]
            assert len(likeliest) == 3 and likeliest == sorted(likeliest, reverse=True)
            assert temperature or likeliest[0] == each.logprob  # greedy


def test_a_completions_are_those_of_a_forward_pass(llama: LanguageModel) -> None:
    _, answer = send(llama, COMPLETION | {"logprobs": 2}, "/completions")
    (choice,) = Completion.model_validate(answer).choices
    found = choice.logprobs
    assert found is not None and found.tokens and found.token_logprobs and found.top_logprobs and found.text_offset
    assert shown(llama, found.tokens) == choice.text
    values = expected(llama, llama.tokenizer("hi")["input_ids"], found.tokens)
    assert found.token_logprobs == pytest.approx([float(value) for value in values], abs=1e-4)
    places = [len(shown(llama, found.tokens[:i])) for i in range(len(found.tokens))]
    assert found.text_offset == places
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob and 2 <= len(top) <= 3


def test_none_are_given_unless_asked_for_and_none_likeliest_may_be(llama: LanguageModel) -> None:
    assert send(llama, CHAT)[1]["choices"][0]["logprobs"] is None
    assert send(llama, COMPLETION | {"logprobs": None}, "/completions")[1]["choices"][0]["logprobs"] is None
    (choice,) = send(llama, CHAT | {"logprobs": True})[1]["choices"]
    assert {len(each["top_logprobs"]) for each in choice["logprobs"]["content"]} == {0}
    (choice,) = send(llama, COMPLETION | {"logprobs": 0}, "/completions")[1]["choices"]
    assert {len(each) for each in choice["logprobs"]["top_logprobs"]} == {1}  # the token's own


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("path", PATHS)
def test_a_stream_gives_those_of_the_answer_in_pieces(architecture: str, path: str) -> None:
    """Never those of a stop text; the bytes of Qwen's tokens are often part of a character only."""
    model = tiny_language_model(architecture)
    is_chat = path == PATHS[0]
    body = (CHAT if is_chat else COMPLETION) | {"n": 3, "temperature": 1.5, "max_tokens": 16}
    body |= {"logprobs": True, "top_logprobs": 2} if is_chat else {"logprobs": 2}

    async def compare(target: LocalServedTarget, _: EngineThread) -> None:
        _, plain = await read(target, request(body, path))
        whole = [each["message"]["content"] if is_chat else each["text"] for each in plain["choices"]]
        stops = [next((text[3:5] for text in whole if len(text) > 6), "zz"), "qq"]
        _, answer = await read(target, request(body | {"stop": stops}, path))
        _, events = await read(target, request(body | {"stop": stops, "stream": True}, path))
        for index, choice in enumerate(answer["choices"]):
            names, values = parts(choice["logprobs"], is_chat)
            streamed = parts(joined(events[:-1], index, is_chat), is_chat)
            assert streamed == (names, pytest.approx(values, abs=1e-4))
            text = choice["message"]["content"] if is_chat else choice["text"]
            raw = b"".join(as_bytes(name) for name in names if name not in model.tokenizer.all_special_tokens)
            assert raw.decode("utf-8", "replace").strip() == text.strip()

    with_target(model, compare)


def parts(logprobs: dict[str, Any], is_chat: bool) -> tuple[list[str], list[float]]:
    """The names of the tokens, and all values: their own, and those of the likeliest."""
    if not logprobs:
        return [], []
    if not is_chat:
        top = [value for each in logprobs["top_logprobs"] for value in each.values()]
        return logprobs["tokens"], [*logprobs["token_logprobs"], *logprobs["text_offset"], *top]
    content = logprobs["content"]
    assert all(bytes(each["bytes"]) == as_bytes(each["token"]) for each in content)
    values = [[each["logprob"], *(other["logprob"] for other in each["top_logprobs"])] for each in content]
    return [each["token"] for each in content], [value for each in values for value in each]


def joined(events: list[str], index: int, is_chat: bool) -> dict[str, Any]:
    """The log-probabilities of a choice in a stream, put together."""
    found: dict[str, Any] = {}
    for event in map(json.loads, events):
        if is_chat:
            ChatCompletionChunk.model_validate(event)
        for choice in event["choices"]:
            if choice["index"] == index and choice["logprobs"]:
                for name, values in choice["logprobs"].items():
                    found[name] = None if values is None else found.get(name, []) + values
    return found


def as_bytes(name: str) -> bytes:
    """The bytes of a token by its name in a completion."""
    if not name.startswith("bytes:"):
        return name.encode()
    return bytes(int(digits, 16) for digits in name.removeprefix("bytes:").split("\\x")[1:])


def test_tokens_are_named_as_they_stand_in_a_text() -> None:
    """With the space that begins a word, byte by byte where they are parts of characters, and special ones too."""
    names = ["<unk>", "</s>", "▁", "a", "▁word", "<0xC3>", "<0xA9>", "é"]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>"))
    found = {name: texts(i) for i, name in enumerate(names)}
    assert found["▁word"] == (" word", b" word")
    assert found["<0xC3>"] == ("bytes:\\xc3", b"\xc3")
    assert found["é"] == ("é", "é".encode())
    assert found["</s>"] == ("</s>", b"</s>")
    assert texts(99) == ("", b"")  # models have more ids than their tokenizer

    texts = TokenTexts(tiny_language_model("qwen2").tokenizer)
    bytewise = [texts(token).bytes for token in tiny_language_model("qwen2").tokenizer.encode("é a\n")]
    assert b"".join(bytewise) == "é a\n".encode()
    assert bytewise[:2] == [b"\xc3", b"\xa9"]
