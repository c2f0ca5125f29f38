import csv
import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from alignpro.config import DataConfig
from alignpro.data import Message, load_prompts
from alignpro.errors import ConfigError, DataError

PAIR = ("chosen", "rejected")


@pytest.fixture
def write(tmp_path):
    """Write a file and return its path: bytes as they are, a list as JSON Lines."""

    def write_file(name, content):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        content = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write_file


def load(source, require=(), **config):
    return load_prompts(DataConfig(source=source, **config), require=require)


def texts(source, **config):
    return [prompt.text for prompt in load(source, **config).prompts]


# ------------------------------------------------------------------------------------------------------------- formats


def test_every_format_plain_and_gzipped_gives_the_same_prompts(write, tmp_path):
    rows = [{"prompt": "one", "answer": "1"}, {"prompt": 'two "quoted",\nlines', "answer": "2"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    write("rows.json", json.dumps(rows, indent=1))
    write("rows.jsonl", rows)
    for name in ("rows.json", "rows.jsonl", "rows.csv", "rows.parquet"):
        zipped = write(f"{name}.gz", (tmp_path / name).read_bytes())
        for path in (str(tmp_path / name), zipped):
            prompts = load(path).prompts
            assert [p.text for p in prompts] == ["one", 'two "quoted",\nlines'], path
            assert [p.metadata["answer"] for p in prompts] == ["1", "2"], path


def test_json_lines_named_json_and_an_array_named_jsonl_are_read(write):
    assert texts(write("a.json", '{"prompt": "a"}\n{"prompt": "b"}\n')) == ["a", "b"]
    assert texts(write("b.jsonl", '\n [{"prompt": "a"}, {"prompt": "b"}]')) == ["a", "b"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("key", ["data", "rows", "examples"])
def test_rows_in_an_object_are_read(write, key, indent):
    path = write("a.json", json.dumps({"version": 1, key: [{"prompt": "a"}, {"prompt": "b"}]}, indent=indent))
    data = load(path)
    assert [prompt.text for prompt in data.prompts] == ["a", "b"]
    assert data.prompts[1].source == f"{path}:{key} row 2"


def test_one_row_is_a_row_even_if_it_holds_a_list_or_spans_lines(write):
    row = {"prompt": "a", "data": [{"prompt": "no"}]}
    assert texts(write("a.jsonl", [row])) == ["a"]
    assert texts(write("b.json", json.dumps(row, indent=2))) == ["a"]
    assert texts(write("r.json", json.dumps(row, indent=2).replace("\n", "\r"))) == ["a"]
    assert texts(write("c.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])) == ["a"]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_any_line_end_is_read(write, name, end):
    lines = {"a.jsonl": ['{"prompt": "a\\rb"}', '{"prompt": "b"}'], "a.csv": ["prompt", "a", "b"]}[name]
    path = write(name, end.join([*lines, ""]))
    data = load(path)
    assert [prompt.text for prompt in data.prompts] == [{"a.jsonl": "a\rb", "a.csv": "a"}[name], "b"]
    assert data.prompts[1].source == f"{path}:{len(lines)}"


@pytest.mark.parametrize(("name", "delimiter"), [("a.tsv", "\t"), ("a.csv", ";"), ("a.csv", "\t"), ("a.csv", "|")])
def test_tables_of_spreadsheets_are_read(write, tmp_path, name, delimiter):
    rows = [{"prompt": "one, two; three", "rewrite": 'a "b"\nc', "note": "x|y\tz"}, {"prompt": "d", "rewrite": "e"}]
    with (tmp_path / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "rewrite", "note"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    first, second = load(str(tmp_path / name)).prompts
    assert (first.text, first.rewrite, first.metadata["note"]) == ("one, two; three", 'a "b"\nc', "x|y\tz")
    assert (second.text, second.rewrite) == ("d", "e")


def test_delimiters_in_the_cells_of_one_column_do_not_split_it(write):
    assert texts(write("a.csv", "prompt\none; two; three\n")) == ["one; two; three"]
    assert texts(write("b.csv", '"prompt","a; b"\nx,y\n')) == ["x"]


def test_dates_that_python_cannot_represent_are_bad_rows(tmp_path):
    times = pyarrow.array([0, 400_000_000_000_000, None], pyarrow.timestamp("s"))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"], "time": times}), path)
    data = load(str(path))
    assert [prompt.text for prompt in data.prompts] == ["a", "c"]
    assert [row.split(":")[1] for row in data.report.bad] == ["row 2"]
    assert "holds a value that Python cannot represent" in data.report.bad[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_history_of_alpaca_precedes_the_prompt(write, name):
    history = [["q1", "a1"], ["q2", "a2"]]
    rows = [{"instruction": "q3", "input": "c", "output": "a3", "system": "s", "history": history}]
    rows += [{"instruction": "alone", "input": "", "output": "x", "system": "", "history": empty} for empty in ([],)]
    if name == "a.csv":
        cells = [[*list(row.values())[:-1], json.dumps(row["history"])] for row in rows]
        text = io.StringIO()
        csv.writer(text).writerows([list(rows[0]), *cells])
        rows = text.getvalue()
    first, second = load(write(name, rows)).prompts
    roles = ["system", "user", "assistant", "user", "assistant", "user"]
    assert [turn.role for turn in first.messages] == roles
    assert [turn.content for turn in first.messages] == ["s", "q1", "a1", "q2", "a2", "q3\n\nc"]
    assert first.metadata == {}
    assert second.messages == (Message("user", "alone"),)


def test_a_history_may_be_messages_and_must_be_turns(write):
    rows = [
        {"instruction": "q", "history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"instruction": "q", "history": None},
        {"instruction": "q", "history": "of rome"},
        {"instruction": "q", "history": [["only one"]]},
    ]
    data = load(write("a.jsonl", rows))
    assert [len(prompt.messages) for prompt in data.prompts] == [3, 1]
    assert (
        "history is text, expected turns; to keep it as it is, map data.columns.metadata.history" in data.report.bad[0]
    )
    assert "history[0] is not a pair" in data.report.bad[1]
    (prompt,) = load(write("b.jsonl", [{"prompt": "q", "history": "of rome"}])).prompts
    assert prompt.metadata == {"history": "of rome"}
    with pytest.raises(ConfigError, match="history without prompt"):
        load(write("c.jsonl", [{"m": [], "h": []}]), columns={"messages": "m", "history": "h"})


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_byte_order_mark_and_windows_line_ends(write, name):
    lines = {"a.jsonl": ['{"prompt": "é"}', "", '{"prompt": "b"}'], "a.csv": ["prompt", "é", "", "b"]}[name]
    path = write(name, b"\xef\xbb\xbf" + "\r\n".join([*lines, ""]).encode())
    data = load(path)
    assert [p.text for p in data.prompts] == ["é", "b"]
    assert data.prompts[1].source == f"{path}:{len(lines)}"


def test_line_separators_inside_a_json_string_do_not_end_the_line(write):
    assert texts(write("a.jsonl", '{"prompt": "a\u2028b\u0085c"}\n')) == ["a\u2028b\u0085c"]


def test_lone_surrogates_become_replacement_characters_and_pairs_stay(write):
    (text,) = texts(write("a.jsonl", rb'{"prompt": "x \ud83d y \ud83d\ude00"}'))
    assert text == "x � y 😀"
    text.encode("utf-8")


def test_very_long_prompts_are_read_also_from_csv(write):
    long = "word " * 100_000
    assert texts(write("a.csv", f"prompt\n{long}\n")) == [long]
    assert csv.field_size_limit() == 131_072


def test_globs_are_sorted_and_sources_are_read_in_order(write, tmp_path):
    write("b.jsonl", [{"prompt": "b"}])
    write("a.jsonl", [{"prompt": "a"}])
    last = write("z.json", '[{"prompt": "z"}]')
    assert texts([last, str(tmp_path / "*.jsonl")]) == ["z", "a", "b"]


# ------------------------------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize("column", ["prompt", "instruction", "question", "text"])
def test_prompt_column_by_name_and_the_rest_is_metadata(write, column):
    (prompt,) = load(write("a.jsonl", [{column: "hello", "category": "greeting"}])).prompts
    assert prompt.messages == (Message("user", "hello"),)
    assert prompt.metadata == {"category": "greeting"}


def test_columns_that_could_hold_a_prompt_are_metadata_beside_one_that_does(write):
    row = {
        "prompt": "hello",
        "question": "who?",
        "text": "long",
        "input": 3,
        "messages": [{"role": "user", "content": "no"}],
    }
    (prompt,) = load(write("a.jsonl", [row])).prompts
    assert prompt.text == "hello"
    assert prompt.metadata == {key: value for key, value in row.items() if key != "prompt"}


def test_instruction_with_and_without_context(write):
    rows = [
        {"instruction": "Sum up.", "context": "A text.", "output": "Text."},
        {"instruction": "Hi.", "context": "", "output": "Ho."},
    ]
    data = load(write("a.jsonl", rows), require=("response",))
    assert [(p.text, p.response) for p in data.prompts] == [("Sum up.\n\nA text.", "Text."), ("Hi.", "Ho.")]


def test_conversations_with_messages_as_answers(write):
    row = {
        "conversations": [
            {"from": "system", "value": "Be kind."},
            {"from": "human", "value": "q1"},
            {"from": "gpt", "value": "a1"},
            {"from": "human", "value": "q2"},
        ],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    }
    (prompt,) = load(write("a.jsonl", [row]), require=PAIR).prompts
    assert [message.role for message in prompt.messages] == ["system", "user", "assistant", "user"]
    assert (prompt.text, prompt.chosen, prompt.rejected) == ("q2", "good", "bad")


def test_transcripts_give_the_conversation(write):
    row = {f"{kind}": f"\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: {kind}!" for kind in PAIR}
    (prompt,) = load(write("a.jsonl", [row]), require=PAIR).prompts
    assert prompt.messages == (Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
    assert (prompt.chosen, prompt.rejected) == ("chosen!", "rejected!")


def test_the_last_answer_of_a_conversation_is_the_response(write):
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (prompt,) = load(write("a.jsonl", [row]), require=("response",)).prompts
    assert (prompt.text, prompt.response) == ("q", "a")


def test_an_answer_that_looks_like_a_transcript_is_taken_whole(write):
    text = "Human: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: ciao"
    rows = [
        {"messages": [{"role": "user", "content": "write a dialogue"}, {"role": "assistant", "content": text}]},
        {"prompt": "write a dialogue again", "response": text},
    ]
    found = [prompt for i, row in enumerate(rows) for prompt in load(write(f"{i}.jsonl", [row])).prompts]
    assert [prompt.response for prompt in found] == [text, text]


def test_mapping_reaches_into_nested_fields_and_dotted_names(write):
    row = {
        "dialog": {"turns": [{"said": "first"}, {"said": "last"}]},
        "labels": {"gold": 42},
        "better.version": "rewritten",
        "who": "a pirate",
    }
    columns = {
        "prompt": "dialog.turns.-1.said",
        "rewrite": "better.version",
        "system": "who",
        "metadata.answer": "labels.gold",
    }
    (prompt,) = load(write("a.jsonl", [row]), columns=columns, require=("rewrite", "metadata.answer")).prompts
    assert prompt.messages == (Message("system", "a pirate"), Message("user", "last"))
    assert prompt.rewrite == "rewritten"
    assert prompt.metadata == {"answer": 42}


def test_an_unknown_column_is_an_error_that_lists_the_columns(write):
    path = write("a.csv", "q,a\nx,y\n")
    with pytest.raises(DataError, match=r"a\.csv: no column 'prmopt' for data\.columns\.prompt \(columns: q, a\)"):
        load(path, columns={"prompt": "prmopt"})
    with pytest.raises(DataError, match=r"no column that holds a prompt \(columns: q, a\).*data\.columns\.prompt="):
        load(path)


def test_unknown_field_and_missing_prompt_in_the_mapping(write):
    path = write("a.csv", "q,a\nx,y\n")
    with pytest.raises(ConfigError, match=r"data\.columns\.promt: unknown field \(did you mean 'prompt'\?\)"):
        load(path, columns={"promt": "q"})
    with pytest.raises(ConfigError, match="does not say where the prompt is"):
        load(path, columns={"rewrite": "a"})
    with pytest.raises(ConfigError, match="both prompt and messages"):
        load(path, columns={"prompt": "q", "messages": "a"})


def test_a_part_of_a_path_that_is_no_number_is_absent(write):
    path = write("a.jsonl", [{"turns": ["x"]}])
    with pytest.raises(DataError, match=r"data\.columns\.prompt=turns\.--1 does not exist in any|no prompts"):
        load(path, columns={"prompt": "turns.--1"})


def test_a_path_absent_from_all_rows_is_an_error_but_one_absent_from_some_is_not(write):
    path = write("a.jsonl", [{"q": "x", "meta": {"gold": 1}}, {"q": "y", "meta": {}}])
    columns = {"prompt": "q", "metadata.answer": "meta.gold"}
    assert len(load(path, columns=columns).prompts) == 2
    with pytest.raises(DataError, match=r"data\.columns\.metadata\.answer=meta\.glod does not exist in any"):
        load(path, columns={"prompt": "q", "metadata.answer": "meta.glod"})


def test_an_absent_required_field_is_an_error(write):
    path = write("a.jsonl", [{"prompt": "x", "better": "y"}])
    with pytest.raises(DataError, match=r"no column for rewrite.*columns: prompt, better.*data\.columns\.rewrite="):
        load(path, require=("rewrite",))


# ------------------------------------------------------------------------------------------------------------ bad rows


def test_broken_json_lines_are_reported_by_line(write):
    lines = [
        b'{"prompt": "good"}',
        b'{"prompt": "cut off',
        b"",
        b'["a list"]',
        b'{"prompt": ""}',
        b'{"other": 1}',
        b'{"prompt": 5}',
        b'{"prompt": "\xff"}',
        b"[" * 100_000,
        b'{"prompt": "good too"}',
    ]
    path = write("a.jsonl", b"\n".join(lines))
    data = load(path)
    assert [p.text for p in data.prompts] == ["good", "good too"]
    assert [p.source for p in data.prompts] == [f"{path}:1", f"{path}:10"]
    expected = [
        "2: not valid JSON: Unterminated string starting at column ",
        "4: expected a JSON object, got list",
        "5: no prompt",
        "6: no prompt",
        "7: prompt is a number (5), expected text",
        "8: not UTF-8 at byte 13",
        "9: not valid JSON: ",
    ]
    assert len(data.report.bad) == len(expected)
    for message, start in zip(data.report.bad, expected, strict=True):
        assert message.startswith(f"{path}:{start}")
    assert (data.report.rows, data.report.kept, data.report.duplicates) == (9, 2, 0)


def test_broken_items_of_an_array_and_of_parquet_are_reported_by_row(write, tmp_path):
    path = write("a.json", json.dumps([{"prompt": "a"}, "b", {"prompt": " \n"}]))
    data = load(path)
    assert data.report.bad == [f"{path}:row 2: expected a JSON object, got str", f"{path}:row 3: no prompt"]
    assert data.prompts[0].source == f"{path}:row 1"
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", None]}), path)
    assert load(str(path)).report.bad == [f"{path}:row 2: no prompt"]


def test_broken_csv_rows_are_reported_by_the_line_they_start_at(write):
    path = write("a.csv", b'prompt,answer\n"two\nlines",1\nshort\nb\xffd,2\n"x"y,3\ngood,4\n"open,5\nend,6\n')
    data = load(path)
    assert [p.text for p in data.prompts] == ["two\nlines", "good"]
    starts = ["4: 1 cells, the header has 2", "5: not UTF-8", "6: not valid CSV", "8: not valid CSV"]
    for message, start in zip(data.report.bad, starts, strict=True):
        assert message.startswith(f"{path}:{start}")


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": [{"role": "user", "content": "q"}, {"role": "system", "content": "s"}]}, "turn of the system"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no prompt"),
        ({"messages": [{"role": "user", "content": "  "}]}, "last turn is empty"),
        ({"messages": [{"role": "robot", "content": "q"}]}, "role 'robot'"),
        ({"messages": {"role": "assistant", "content": "a"}}, "no prompt"),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "chosen": "c"},
            "turn of the assistant",
        ),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: a"}, "differ before"),
        ({"chosen": "\n\nHuman: q", "rejected": None}, "turn of the user"),
        ({"chosen": "just text", "rejected": "other text"}, "no prompt"),
    ],
)
def test_unusable_conversations_are_bad_rows(write, row, complaint):
    path = write("a.jsonl", [row])
    with pytest.raises(DataError, match=f"all of its 1 rows are bad:\n.*a.jsonl:1: .*{complaint}"):
        load(path)


def test_rows_without_a_required_field_are_bad(write):
    path = write("a.jsonl", [{"prompt": "a", "rewrite": "A"}, {"prompt": "b", "rewrite": None}, {"prompt": "c"}])
    data = load(path, require=("rewrite",))
    assert data.report.bad == [f"{path}:2: no rewrite", f"{path}:3: no rewrite"]
    assert len(load(path).prompts) == 3


def test_more_bad_rows_than_the_limit_are_an_error(write):
    path = write("a.jsonl", [{"prompt": "good"}] + [{"prompt": 1}] * 3)
    assert len(load(path, max_bad_rows=3).report.bad) == 3
    with pytest.raises(DataError, match=r"more than 2 bad rows:\n.*a\.jsonl:2: prompt is a number") as error:
        load(path, max_bad_rows=2)
    assert "data.max_bad_rows" in str(error.value)


# --------------------------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_empty_files_are_an_error(write, name):
    with pytest.raises(DataError, match=rf"{name}: no prompts: it has no rows"):
        load(write(name, b""))


def test_a_missing_file_says_which_directory_its_path_starts_at(tmp_path, monkeypatch):
    """Not that of the YAML file, beside which a reward function may be."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        load("missing.jsonl")
    assert str(error.value).endswith(f"; looked for it in {tmp_path}")


def test_unreadable_files_are_errors(write, tmp_path):
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file, and no preset \(presets: ultrafeedback"):
        load(str(tmp_path / "missing.jsonl"))
    with pytest.raises(DataError, match="is a directory"):
        load(str(tmp_path))
    with pytest.raises(DataError, match=r"unknown kind of file; expected \.json"):
        load(write("a.txt", "x"))
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 100)[:-20])
    for name in ("b.jsonl.gz", "c.jsonl.gz"):
        with pytest.raises(DataError, match="damaged or not gzip"):
            load(str(tmp_path / name))
    with pytest.raises(DataError, match=r"a\.json:2: not valid JSON"):
        load(write("a.json", '[{"prompt": "x"},\n{"prompt": }]'))
    with pytest.raises(DataError, match="is UTF-16"):
        load(write("u.csv", "prompt\nx\n".encode("utf-16")))
    with pytest.raises(DataError, match="not a readable Parquet file"):
        load(write("a.parquet", b"PAR1 and no more"))
    with pytest.raises(DataError, match="two columns have the same name: prompt"):
        load(write("d.csv", "prompt,prompt\na,b\n"))
    with pytest.raises(DataError, match=r"h\.csv:1: the column names are not UTF-8"):
        load(write("h.csv", b"prompt,caf\xe9\na,b\n"))
    with pytest.raises(DataError, match="only presets have splits"):
        load(write("s.jsonl", [{"prompt": "x"}]), split="train")


# --------------------------------------------------------------------------------------------- duplicates and limits


def test_duplicates_are_dropped_across_files_too(write):
    a = write("a.jsonl", [{"prompt": "x"}, {"prompt": "y"}, {"prompt": "x"}])
    b = write("b.csv", "question\ny\nz\n")
    data = load([a, b])
    assert [p.text for p in data.prompts] == ["x", "y", "z"]
    assert (data.report.rows, data.report.kept, data.report.duplicates) == (5, 3, 2)


def test_a_prompt_may_have_several_pairs_without_duplicates(write):
    rows = [
        {"prompt": "x", "chosen": "a", "rejected": "b"},
        {"prompt": "x", "chosen": "a", "rejected": "c"},
        {"prompt": "x", "chosen": "a", "rejected": "b"},
    ]
    path = write("a.jsonl", rows)
    pairs = load(path, require=PAIR)
    assert [p.rejected for p in pairs.prompts] == ["b", "c"]
    assert pairs.report.duplicates == 1
    assert len(load(path).prompts) == 1


def test_limit_takes_the_first_distinct_prompts(write):
    path = write("a.jsonl", [{"prompt": "x"}, {"prompt": "x"}, {"prompt": "y"}, {"prompt": "z"}])
    data = load(path, limit=2)
    assert [p.text for p in data.prompts] == ["x", "y"]
    assert (data.report.rows, data.report.duplicates) == (3, 1)
