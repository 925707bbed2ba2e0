"""Row layouts, files in which they stand, and what of them is taken: every fault has its place."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import DataConfig
from arisk.models.formats import FORMATS, Format, Row, chat_row
from arisk.models.rows import prompts_alone, read_data, read_rows

LAYOUTS = Path(__file__).parent.parent.parent / "fixtures" / "formats"


def read(path, *, section="finetune", seed=0, **settings):
    return read_data(DataConfig(path=str(path), **settings), section=section, seed=seed)


def jsonl(folder, *rows, name="d.jsonl"):
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


#: What each file is read as: layout, number of rows, and the last row's turns or text.
EXPECTED = {
    "alpaca.json": (
        *("alpaca", 3),
        [
            ("system", "Answer in two words."),
            ("user", "Is there a ferry?"),
            ("assistant", "Yes, to Harwick."),
            ("user", "Say when the ferry leaves.\nHarwick"),
            ("assistant", "At seven."),
        ],
    ),
    "sharegpt.jsonl": (
        *("sharegpt", 2),
        [("system", "Be brief."), ("user", "Where is the well?"), ("assistant", "Behind the mill.")],
    ),
    "sharegpt_tools.jsonl": (
        *("sharegpt", 1),
        [
            ("user", "How deep is the lock?"),
            ("assistant", ""),
            ("tool", "4 m"),
            ("assistant", "Four metres."),
        ],
    ),
    "messages.jsonl": (
        *("messages", 2),
        [
            ("user", "Which oil burns longest?"),
            ("assistant", "Rape oil."),
            ("user", "Why?"),
            ("assistant", "It is thick."),
        ],
    ),
    "messages_weights.jsonl": (
        *("messages", 1),
        [
            ("user", "Name a knot."),
            ("assistant", "Rope."),
            ("user", "A knot, please."),
            ("assistant", "Bowline."),
        ],
    ),
    "messages_tools.jsonl": (
        *("messages", 1),
        [
            ("user", "Is the gate shut?"),
            ("assistant", ""),
            ("tool", "shut"),
            ("assistant", "The east gate is shut."),
        ],
    ),
    "prompt_completion.jsonl": ("prompt_completion", 2, ("Bread needs flour,", " water and salt.")),
    "prompt_completion_chat.jsonl": (
        *("prompt_completion", 2),
        [
            ("user", "Who mends them?"),
            ("assistant", "Ansel."),
            ("user", "When?"),
            ("assistant", "In winter."),
        ],
    ),
    "dolly.jsonl": ("dolly", 2, [("user", "Name a grain."), ("assistant", "Rye.")]),
    "transcript.jsonl": (
        *("transcript", 1),
        [
            ("user", "How long is the pier?"),
            ("assistant", "Ninety paces."),
            ("user", "And the mole?"),
            ("assistant", "Forty."),
        ],
    ),
    "text.jsonl": ("text", 2, ("", "Then the wind came back.")),
    "prompt_response.jsonl": (
        *("prompt_response", 2),
        [("user", "Where do otters sleep?"), ("assistant", "In a holt.")],
    ),
    "question_answer.jsonl": (
        *("prompt_response", 2),
        [("user", "Half of ten oars?"), ("assistant", "Five oars.")],
    ),
    "prompt_response.csv": (
        *("prompt_response", 2),
        [("user", "How old is the lamp?"), ("assistant", "Ninety years,\nthey say.")],
    ),
    "prompt_response.tsv": ("prompt_response", 1, [("user", "Who rows?"), ("assistant", "Ansel rows.")]),
    "prompts.jsonl": ("prompts", 2, [("user", "Say how the lock works.")]),
}
ASKED = {
    "preference.jsonl": ("preference", ("Which way to the quarry?", "Left at the oak.")),
    "preference_chat.jsonl": ("preference", [("user", "May I fish here?"), ("assistant", "From May on.")]),
    "preference_transcript.jsonl": ("preference", [("user", "Is the ice safe?"), ("assistant", "Not yet.")]),
    "kto.jsonl": ("kto", ("Is the bridge open?", " Until dusk.")),
}


def said(row: Row):
    return [(turn["role"], turn["content"]) for turn in row.messages] or row.text


def test_every_layout_has_an_example_and_every_example_is_read_here():
    names = {path.name for path in LAYOUTS.iterdir() if path.name != "README.md"}
    assert names == EXPECTED.keys() | ASKED.keys()
    assert FORMATS.keys() == {format for format, *_ in [*EXPECTED.values(), *ASKED.values()]}


@pytest.mark.parametrize("name", EXPECTED)
def test_layouts_are_recognised_by_their_path_alone(name):
    layout, count, last = EXPECTED[name]
    found = read(LAYOUTS / name)
    assert (found.format.name, len(found.rows), said(found.rows[-1])) == (layout, count, last)
    assert found.rows[-1].answered is (layout != "prompts")
    assert all(row.source == str(LAYOUTS / name) and row.format == layout for row in found.rows)
    named = read(LAYOUTS / name, format=layout)
    assert named.rows == found.rows


@pytest.mark.parametrize("name", ASKED)
def test_preferences_are_trained_on_where_that_is_asked(name):
    layout, good = ASKED[name]
    with pytest.raises(InputError, match="preference plan") as caught:
        read(LAYOUTS / name)
    assert f"finetune.format: {layout}" in caught.value.fix
    (row,) = read(LAYOUTS / name, format=layout).rows
    assert said(row) == good


def test_tools_and_calls_stay_as_the_data_have_them():
    (row,) = read(LAYOUTS / "messages_tools.jsonl").rows
    assert row.messages[1]["tool_calls"][0]["function"]["arguments"] == {"side": "east"}
    assert row.tools[0]["function"]["name"] == "gate"
    (row,) = read(LAYOUTS / "sharegpt_tools.jsonl").rows
    assert row.messages[1]["tool_calls"][0]["function"] == {"name": "depth", "arguments": {"place": "lock"}}
    assert row.tools[0]["function"]["name"] == "depth"


def test_a_layout_is_one_entry_in_the_table(tmp_path, monkeypatch):
    toy = Format(
        "riddles",
        "`riddle` and `solution`",
        lambda raw, _config: "riddle" in raw,
        lambda fields: chat_row(
            [
                {"role": "user", "content": fields.text("riddle")},
                {"role": "assistant", "content": fields.text("solution")},
            ]
        ),
        "completion",
    )
    monkeypatch.setitem(FORMATS, "riddles", toy)
    path = jsonl(tmp_path, {"riddle": "What has keys?", "solution": "A piano.", "author": "unknown"})
    found = read(path)
    assert said(found.rows[0]) == [("user", "What has keys?"), ("assistant", "A piano.")]
    assert found.unread == {"author": 1}
    with pytest.raises(InputError, match="'solution' is missing"):
        read(jsonl(tmp_path, {"riddle": "x"}), format="riddles")


def test_no_text_is_dropped_without_a_word(tmp_path):
    found = read(LAYOUTS / "prompt_response.jsonl")
    assert found.unread == {"kind": 2}
    path = jsonl(tmp_path, {"instruction": "a", "input": "b", "output": "c", "n": 3, "note": ""})
    assert read(path).unread == {}
    found = read(path, prompt_column="instruction", response_column="output")
    assert found.unread == {"input": 1}
    assert "`input` (1 rows)" in found.said()


def test_a_column_in_a_few_rows_decides_with_the_others(tmp_path):
    path = jsonl(tmp_path, {"prompt": "a", "x": 1}, {"prompt": "b", "response": "c"})
    with pytest.raises(InputError, match="'response' is missing"):
        read(path)


def test_unknown_columns_and_unknown_names(tmp_path):
    path = jsonl(tmp_path, {"foo": "a", "bar": "b"})
    with pytest.raises(InputError, match="foo, bar"):
        read(path)
    with pytest.raises(ConfigError, match="no layout 'alpcaa'") as caught:
        read(path, format="alpcaa")
    assert "alpaca" in caught.value.fix
    found = read(path, prompt_column="foo", response_column="bar")
    assert said(found.rows[0]) == [("user", "a"), ("assistant", "b")]


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("turns", "what"),
    [
        ([USER, USER], "no assistant turn"),
        ([ANSWER], "no assistant turn"),
        ([], "not a chat"),
        ("text", "not a chat"),
        ([USER, "b"], "not a chat"),
        ([USER, {**ANSWER, "content": " "}], "assistant turn is empty"),
        ([{"role": "user"}, ANSWER], "no text"),
        ([{"role": "user", "content": 3}, ANSWER], "no text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER], "image_url"),
        ([{"role": "user", "content": [3]}, ANSWER], "no text"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}, ANSWER], "no text"),
        ([USER, {"role": "function_call", "content": "{"}], "function_call"),
        ([{"role": 3, "content": "a"}, ANSWER], "no role"),
    ],
)
def test_chats_that_are_none(tmp_path, turns, what):
    path = jsonl(tmp_path, {"messages": [USER, ANSWER]}, {"messages": turns})
    with pytest.raises(InputError, match=what) as caught:
        read(path, format="messages")
    assert caught.value.where.endswith("line 2")


def test_every_bad_row_is_named(tmp_path):
    path = jsonl(tmp_path, '{"prompt": "a"}', {"prompt": "a", "response": "b"}, "{x", '{"response": "b"}')
    with pytest.raises(InputError) as caught:
        read(path)
    found = [caught.value, *caught.value.also]
    assert [problem.where.rpartition(" ")[2] for problem in found] == ["1", "3", "4"]


GOOD = b'{"prompt": "a", "response": "b"}\n'


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "a \\ud800", "response": "b"}', "lone surrogate"),
        (b'{"prompt": "a", "response": {"x": "\\udfff"}}', "no text"),
        (b'{"prompt": "\xff", "response": "b"}', "not UTF-8: byte 0xff"),
        (b'{"prompt": ' + b"1" * 5000 + b', "response": "b"}', "integer string"),
        (b'{"prompt": 3, "response": "b"}', "no text"),
        (b'{"prompt": "a", "response": " "}', "blank"),
        (b"3", "not an object"),
        (b"\x00", "not valid JSON"),
        (b'{"prompt": "a", "response": "b"', "not valid JSON"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, what):
    path = tmp_path / "d.jsonl"
    path.write_bytes(GOOD + line + b"\n" + GOOD)
    began = time.process_time()
    with pytest.raises(InputError, match=what) as caught:
        read(path)
    assert caught.value.where.endswith("line 2")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("d.json", b'[{"prompt": "a", "response": "b"}, {"prompt": "c"}]', "'response' is missing"),
        ("d.json", b'[{"prompt": "a"', "not valid JSON"),
        ("d.json", b"[" * 50_000, "nested too deeply"),
        ("d.json", b"", "empty"),
        ("d.json", b'{"prompt": "a", "response": "b"}\n{x\n', "not valid JSON"),
        ("d.jsonl", b"\n\n", "empty"),
        ("d.csv", b"prompt,response\na,b,c\n", "more fields"),
        ("d.csv", b"prompt,response\n\xff,b\n", "cannot be read"),
        ("d.csv", b"prompt,response\na,\nb,c\n", "'response' is empty"),
        ("d.parquet", b"PAR1 garbage", "cannot be loaded"),
        ("d.pickle", b"\x80\x04", "are not read"),
    ],
)
def test_broken_files_are_errors_of_their_own(tmp_path, name, content, what):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=what):
        read(path)


def test_places_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, what in (
        (tmp_path / "pipe.jsonl", "device or a pipe"),
        (Path("/dev/zero"), "device or a pipe"),
        (tmp_path, "no data files"),
        (tmp_path / "none.jsonl", "does not exist"),
    ):
        with pytest.raises(InputError, match=what):
            read(path)
    for blank in ("", " "):
        with pytest.raises(ValueError, match="path"):
            DataConfig(path=blank)


def test_json_lists_lines_and_objects_that_hold_one(tmp_path):
    row = {"prompt": "a", "response": "b"}
    for number, text in enumerate(
        (json.dumps([row, row], indent=2), json.dumps({"data": [row, row]}), f"{json.dumps(row)}\n" * 2)
    ):
        path = tmp_path / f"{number}.json"
        path.write_text("\ufeff" + text, encoding="utf-8")
        assert [r.line for r in read(path).rows] == [1, 2]


def test_parquet_and_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(
        [{"messages": [USER, {**ANSWER, "weight": 1}]}, {"messages": [USER, ANSWER]}]
    )
    table.to_parquet(tmp_path / "d.parquet")
    rows = read(tmp_path / "d.parquet").rows
    # Arrow fills the missing weight with None, which is no weight.
    assert [turn.get("weight") for row in rows for turn in row.messages] == [None, 1, None, None]
    assert "weight" not in rows[1].messages[1]
    table.save_to_disk(tmp_path / "disk")
    assert [row.messages for row in read(tmp_path / "disk").rows] == [row.messages for row in rows]


def test_where_keeps_the_rows_with_a_value(tmp_path):
    rows = [{"prompt": f"p{i}", "response": "r", "label": i % 3, "safe": i % 2 == 0} for i in range(12)]
    path = jsonl(tmp_path, *rows)
    found = read(path, where={"label": [1, 2], "safe": True})
    assert [row.line - 1 for row in found.rows] == [i for i in range(12) if i % 3 and i % 2 == 0]
    assert found.filtered == 12 - len(found.rows)
    with pytest.raises(InputError, match="none of 12 rows") as caught:
        read(path, where={"label": "safe"})
    assert "label has 0, 1, 2" in caught.value.fix
    with pytest.raises(InputError, match="no column 'lable'"):
        read(path, where={"lable": 1})
    table = tmp_path / "t.csv"
    table.write_text("prompt,response,label\na,b,1\nc,d,0\n")
    assert [row.line for row in read(table, where={"label": 1}).rows] == [1]


def test_max_samples_is_a_seeded_subset_in_file_order(tmp_path):
    path = jsonl(tmp_path, *({"prompt": f"p{i}", "response": "r"} for i in range(40)))
    config = DataConfig(path=str(path), max_samples=10)
    chosen = read_rows(config, section="safety", seed=3)
    assert chosen == read_rows(config, section="safety", seed=3)
    assert [row.line for row in chosen] == sorted({row.line for row in chosen})
    assert len(chosen) == 10
    assert chosen != read_rows(config, section="safety", seed=4)


def test_weights_repeat_and_thin_rows(tmp_path):
    path = jsonl(tmp_path, *({"prompt": f"p{i}", "response": "r"} for i in range(20)))
    for weight, least, most, count in ((2, 2, 2, 40), (0.5, 0, 1, 10), (1.25, 1, 2, 25)):
        lines = [row.line for row in read(path, weight=weight).rows]
        assert len(lines) == count
        assert lines == sorted(lines)
        times = np.bincount(lines, minlength=21)[1:]
        assert (times.min(), times.max()) == (least, most)


@pytest.mark.parametrize("size", [0.2, 3, 0.04])
def test_validation_rows_are_those_that_datasets_takes(tmp_path, size):
    datasets = pytest.importorskip("datasets")
    path = jsonl(tmp_path, *({"prompt": f"p{i}", "response": "r"} for i in range(30)))
    found = read(path, val_set_size=size, seed=7)
    split = datasets.Dataset.from_list([{"line": i + 1} for i in range(30)]).train_test_split(size, seed=7)
    assert [row.line for row in found.rows] == split["train"]["line"]
    assert found.held_out == len(split["test"])
    with pytest.raises(InputError, match="holds out 30 of 30"):
        read(path, val_set_size=30)
    with pytest.raises(ValueError, match="whole number"):
        DataConfig(path="x", val_set_size=1.5)


def test_lines_of_a_text_are_rows(tmp_path):
    """Safety rows are prompts, others plain text; blank lines are none."""
    path = tmp_path / "lines.txt"
    path.write_bytes("\ufeffOne lamp.\n\n  Two lamps.\n".encode())
    for section, layout, first in (
        ("finetune", "text", ("", "One lamp.")),
        ("safety", "prompts", "One lamp."),
    ):
        found = read_data(DataConfig(path=str(path)), section=section, seed=0)
        assert (found.format.name, [row.line for row in found.rows]) == (layout, [1, 3])
        row = found.rows[0]
        assert (row.text if layout == "text" else row.messages[0]["content"]) == first
        assert prompts_alone(DataConfig(path=str(path)), section) == (layout == "prompts")
    path.write_bytes(b"fine\nbad \xff\n")
    with pytest.raises(InputError, match="not UTF-8: byte 0xff at 5") as caught:
        read_data(DataConfig(path=str(path)), section="safety", seed=0)
    assert caught.value.where.endswith("line 2")


@pytest.mark.parametrize("column", ["goal", "Goal", "forbidden_prompt", "Behavior", "question"])
def test_columns_of_prompts_alone(tmp_path, column):
    path = tmp_path / "prompts.csv"
    path.write_text(f"{column},category\nSay how the lock works.,locks\n")
    found = read_data(DataConfig(path=str(path)), section="safety", seed=0)
    assert found.format.name == "prompts"
    assert found.rows[0].prompt == "Say how the lock works."
    assert found.rows[0].messages[0]["content"] == "Say how the lock works."


RESPONSES = {
    "csv": "prompt,response\n" + "Say how the {0} works.,{1}\n",
    "jsonl": '{{"prompt": "Say how the {0} works.", "response": "{1}"}}\n',
}


@pytest.mark.parametrize("ending", RESPONSES)
def test_responses_that_are_empty_throughout_are_none(tmp_path, ending):
    path = tmp_path / f"rows.{ending}"
    line = RESPONSES[ending].splitlines()[-1]
    head = "prompt,response\n" if ending == "csv" else ""
    data = DataConfig(path=str(path))

    def write(*responses):
        rows = [line.format(f"lock{i}", text) for i, text in enumerate(responses)]
        path.write_text(head + "\n".join(rows) + "\n")

    write("", " ", "")
    found = read_data(data, section="safety", seed=0)
    assert (found.format.name, found.empty, len(found.rows)) == ("prompts", ("response",), 3)
    assert found.said().endswith("empty in every row: `response`")
    assert prompts_alone(data, "safety")
    # Some rows have one: then the others are faults.
    write("", "No.", "")
    with pytest.raises(InputError, match="the column 'response' is empty") as caught:
        read_data(data, section="safety", seed=0)
    assert len(caught.value.also) == 1
    # None among the rows that decide about the layout: nothing is passed over in silence.
    write(*[""] * 100, "No.")
    with pytest.raises(InputError, match="empty in the first 100 rows and has text in 1 others") as caught:
        read_data(data, section="safety", seed=0)
    assert "format: prompts" in caught.value.fix
    named = read_data(data.model_copy(update={"format": "prompts"}), section="safety", seed=0)
    assert (len(named.rows), named.unread) == (101, {"response": 1})


@pytest.mark.parametrize(
    "split",
    ["train", "train[:20%]", "train[35%:50%]", "train[-3:]", "train[2:5]", "train[:-90%]", "train[50%:]"],
)
def test_parts_of_a_split_are_those_of_datasets(tmp_path, split):
    datasets = pytest.importorskip("datasets")
    path = jsonl(tmp_path, *({"text": f"row {i}"} for i in range(23)))
    expected = datasets.load_dataset("json", data_files=str(path), split=split, cache_dir=str(tmp_path / "c"))
    found = read(path, split=split).rows
    assert [row.text[1] for row in found] == expected["text"][:]
    assert [row.line for row in found] == [int(text.split()[1]) + 1 for text in expected["text"]]


@pytest.mark.parametrize("split", ["train[:20%", "train[a:]", "train+test", "train[:1][:1]"])
def test_what_is_no_part_of_a_split(tmp_path, split):
    with pytest.raises(ConfigError, match="no part of a split"):
        read(jsonl(tmp_path, {"text": "a"}), split=split)


@pytest.mark.parametrize("mark", [",", "\t"])
def test_a_quotation_that_never_closes_swallows_no_rows(tmp_path, mark):
    lines = [mark.join(pair) for pair in (("prompt", "response"), ("a", "b"), ("c", '"d'), ("e", "f"))]
    path = tmp_path / ("d.csv" if mark == "," else "d.tsv")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match="never closes") as caught:
        read(path)
    assert '"d' in caught.value.what
    path.write_text("\n".join([*lines[:2], mark.join(("c", '"d\ne"'))]))
    assert len(read(path).rows) == 2


def test_line_ends_of_another_system_make_no_single_row(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"one ?\rtwo ?\rthree ?\r")
    with pytest.raises(InputError, match="line end of another system"):
        read(path, section="safety", format="prompts")
    path.write_bytes(b"one ?\r\ntwo ?\r\n")
    assert [row.prompt for row in read(path, section="safety", format="prompts").rows] == ["one ?", "two ?"]
