"""What may be rewritten in a request: the last message's text, if it is a user's, and no other byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alignpro.data import Message
from alignpro.serving.contract import Api, Asked
from alignpro.serving.prompt_span import read_conversation, replaced

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
AUDIO = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}


def asked(body: Any, api: Api = "chat", raw: bytes | None = None) -> Asked:
    return Asked(api, body, json.dumps(body).encode() if raw is None else raw, "id")


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "cache_control": {"type": "ephemeral"}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def rewritten(request: Asked, new: str = "NEW") -> Any:
    conversation = read_conversation(request)
    assert conversation.last is not None
    return json.loads(replaced(request.raw, request.api, [(conversation.last, new)]))


def test_the_last_user_message_is_rewritten_and_nothing_else() -> None:
    raw = b"""{ "model":"m", "temperature": 0.10, "messages" : [ {"role":"user","content":"a"},
      {"content" : "h\\u00e9llo \\"you\\"" ,"role":"user", "x":1e5}],"messages_":0, "unknown": {"content":"a"}}"""
    request = asked(json.loads(raw), raw=raw)
    last = read_conversation(request).last
    assert last is not None
    assert last.text == 'héllo "you"'
    new = replaced(raw, "chat", [(last, 'ü "q"\n')])
    assert new == raw.replace(b'"h\\u00e9llo \\"you\\""', '"ü \\"q\\"\\n"'.encode())


def test_text_parts_are_rewritten_between_the_others() -> None:
    body = {"messages": [user([IMAGE, part("one"), part(" "), AUDIO])]}
    assert rewritten(asked(body)) == {"messages": [user([IMAGE, part("NEW"), part(" "), AUDIO])]}


def test_parts_that_follow_each_other_are_one_text() -> None:
    body = {"messages": [user([part("one"), part("two"), IMAGE])]}
    last = read_conversation(asked(body)).last
    assert last is not None
    assert last.text == "one\ntwo"
    assert rewritten(asked(body)) == {"messages": [user([part("NEW"), IMAGE])]}


def test_the_place_of_an_image_between_texts_is_kept() -> None:
    conversation = read_conversation(asked({"messages": [user([part("compare"), IMAGE, part("with this"), IMAGE])]}))
    assert (conversation.last, conversation.reason) == (None, "several_texts")


@pytest.mark.parametrize(
    "messages",
    [
        [user("q"), {"role": "assistant", "content": "Sure, here"}],
        [user("q"), {"role": "tool", "tool_call_id": "1", "content": "42"}],
        [{"role": "system", "content": "q"}],
        [user("  \n")],
        [user([])],
        [user([IMAGE])],
        [user(None)],
        [user({"type": "text", "text": "x"})],
        [user([{"type": "text", "text": 3}])],
        [user([{"type": "input_audio", "text": "x"}])],
        ["x"],
        [None],
        [],
        {},
        "x",
        None,
    ],
)
def test_nothing_else_is_rewritten(messages: Any) -> None:
    conversation = read_conversation(asked({"messages": messages}))
    assert (conversation.last, conversation.reason) == (None, "no_user_text")


def test_a_completion_is_rewritten_if_its_prompt_is_one_string() -> None:
    assert rewritten(asked({"prompt": "a", "n": 1}, "completions")) == {"prompt": "NEW", "n": 1}
    for prompt in (["a"], [1, 2], "", None, ["a", "b"]):
        assert read_conversation(asked({"prompt": prompt}, "completions")).last is None


def test_the_prompter_is_shown_the_texts_of_the_conversation() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        user([part("one"), IMAGE, part("two")]),
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 42."},
        user("and \ud800?"),
    ]
    prompt = read_conversation(asked({"messages": messages})).prompt
    assert prompt is not None
    assert prompt.messages == (
        Message("system", "Be brief."),
        Message("user", "one\ntwo"),
        Message("assistant", "It is 42."),
        Message("user", "and \ufffd?"),
    )


def test_a_turn_is_known_by_the_conversation_before_it() -> None:
    first = {"messages": [user("a"), {"role": "assistant", "content": "b", "refusal": None}, user("a")]}
    again = {"messages": [user("a"), {"content": "b", "role": "assistant"}, user("a")]}
    other = {"messages": [user("a"), {"content": "c", "role": "assistant"}, user("a")]}
    one, two, three = (read_conversation(asked(body)) for body in (first, again, other))
    assert one.last and two.last and three.last
    assert one.last.digest == two.last.digest != three.last.digest != one.earlier[0].digest
    assert one.earlier == three.earlier


def test_bytes_of_another_document_are_not_touched() -> None:
    request = asked({"messages": [user("a")]}, raw=b'{"messages": [{"content": "b"}]}')
    last = read_conversation(request).last
    assert last is not None
    with pytest.raises(ValueError, match="not in the body"):
        replaced(request.raw, "chat", [(last, "x")])


Texts = st.text(max_size=8)
Contents = Texts | st.lists(st.builds(part, Texts) | st.just(IMAGE), max_size=3)
Roles = st.sampled_from(["user", "assistant", "tool"])
Messages = st.lists(st.builds(lambda role, content: {"role": role, "content": content}, Roles, Contents), max_size=4)


@given(Messages, Texts, st.booleans(), st.integers(0, 3))
def test_only_texts_differ_after_a_replacement(messages: list[Any], new: str, escaped: bool, indent: int) -> None:
    body = {"n": 1, "messages": messages, "stop": ["\\"]}
    raw = json.dumps(body, ensure_ascii=escaped, indent=indent).encode("utf-8", "surrogatepass")
    conversation = read_conversation(asked(body, raw=raw))
    turns = [*conversation.earlier, *([conversation.last] if conversation.last else [])]
    after = json.loads(replaced(raw, "chat", [(turn, new) for turn in turns]))
    for turn in turns:
        assert turn.index is not None
        if turn.parts is None:
            messages[turn.index]["content"] = new
        else:
            first, *others = turn.parts
            messages[turn.index]["content"][first]["text"] = new
            for place in reversed(others):
                del messages[turn.index]["content"][place]
    assert after == body
