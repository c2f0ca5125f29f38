import pytest

from alignpro.data import Message
from alignpro.data.conversation_formats import BadRow, read_answer, read_conversation, read_transcript


def turns(*pairs):
    return tuple(Message(role, content) for role, content in pairs)


def test_sharegpt_and_openai_forms_are_the_same_conversation():
    sharegpt = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    openai = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a"},
    ]
    expected = turns(("system", "s"), ("user", "q"), ("assistant", "a"))
    assert read_conversation(sharegpt, "messages") == read_conversation(openai, "messages") == expected


def test_messages_in_a_csv_cell_are_read_and_a_prompt_that_shows_json_stays_text():
    cell = '[{"role": "user", "content": "q"}]'
    assert read_conversation(cell, "messages") == turns(("user", "q"))
    question = '[{"name": "Ann"}] is what as YAML?'
    assert read_conversation(question, "prompt") == turns(("user", question))
    data = '[{"name": "Ann"}]'
    assert read_conversation(data, "prompt") == turns(("user", data))


def test_transcript_becomes_turns():
    text = "\n\nHuman: hi\nthere\n\nAssistant: Hello.\n\nAssistant: Who are you?\n\nHuman: me: Human: \n\nAssistant:"
    assert read_transcript(text) == turns(
        ("user", "hi\nthere"), ("assistant", "Hello.\n\nWho are you?"), ("user", "me: Human:")
    )


@pytest.mark.parametrize("text", ["Human: a word for person?", "What does\n\nHuman: mean?", "Assistant: hi"])
def test_text_that_is_not_a_transcript_is_not_parsed(text):
    assert read_transcript(text) is None
    assert read_conversation(text, "prompt") == turns(("user", text))


def test_an_answer_may_be_text_a_message_a_conversation_or_a_transcript():
    opening = turns(("user", "q"))
    assert read_answer("a", "chosen").text == "a"
    assert read_answer({"from": "gpt", "value": "a"}, "chosen").text == "a"
    for form in (
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "\n\nHuman: q\n\nAssistant: a",
    ):
        answer = read_answer(form, "chosen")
        assert (answer.opening, answer.text) == (opening, "a")


@pytest.mark.parametrize("nothing", [None, "", " \n", float("nan"), [], "\n\nHuman: q\n\nAssistant:"])
def test_empty_values_are_no_answer(nothing):
    assert read_answer(nothing, "chosen") is None


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (5, r"chosen is a number \(5\), expected text"),
        (["a"], r"chosen\[0\] is text, expected a message"),
        ([{"role": "tool", "content": "a"}], "role 'tool'"),
        ([{"role": "assistant", "content": 5}], "has a number"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "a part that is not text"),
        ([{"role": "user", "content": "a"}], "ends with a turn of the user"),
        ("\n\nHuman: only a question", "ends with a turn of the user"),
    ],
)
def test_an_invalid_answer_is_described(value, complaint):
    with pytest.raises(BadRow, match=complaint):
        read_answer(value, "chosen")
