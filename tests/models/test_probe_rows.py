"""Questions with options: every way in which data name the right one, and rows that have none."""

import json
from pathlib import Path

import pytest

from arisk.base.errors import InputError
from arisk.config.plan import Config, ProbeConfig, data_sets
from arisk.models.loading import load_tokenizer
from arisk.models.rows import read_data
from arisk.models.tasks import load_set

OPTIONS = ["red", "green", "blue"]


def read(tmp_path, *rows, **settings):
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ProbeConfig(path=str(path), measure="choice", **settings)
    return read_data(config, section="probes.quiz", seed=0).rows


@pytest.mark.parametrize(
    ("row", "settings", "right"),
    [
        ({"question": "q", "choices": OPTIONS, "answer": 1}, {}, "green"),
        ({"question": "q", "choices": OPTIONS, "answer": "C"}, {}, "blue"),
        ({"prompt": "q", "choices": OPTIONS, "answer": "red"}, {}, "red"),
        # HellaSwag writes the number as text, ARC has options with labels of their own.
        (
            {"ctx": "q", "endings": OPTIONS, "label": "2"},
            {"prompt_column": "ctx", "options_column": "endings", "answer_column": "label"},
            "blue",
        ),
        (
            {"question": "q", "choices": {"text": OPTIONS, "label": ["1", "2", "3"]}, "answerKey": "1"},
            {"answer_column": "answerKey"},
            "red",
        ),
        # A text that is an option wins over the number that it could be.
        ({"question": "q", "choices": ["2", "1", "0"], "answer": "0"}, {}, "0"),
        ({"question": "q", "choices": ["2", "1", "0"], "answer": 0}, {}, "2"),
    ],
)
def test_the_right_option(tmp_path, row, settings, right):
    (read_row,) = read(tmp_path, row, **settings)
    assert read_row.response == right
    assert read_row.prompt == "q"
    assert len(read_row.options) == 3


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "q", "answer": 0}, "'choices' holds no list of two or more different options"),
        ({"question": "q", "choices": ["one"], "answer": 0}, "two or more different options"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "two or more different options"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "two or more different options"),
        ({"question": "q", "choices": "a or b", "answer": 0}, "two or more different options"),
        ({"question": "q", "choices": OPTIONS}, "'answer' is missing"),
        ({"question": "q", "choices": OPTIONS, "answer": 3}, "names none of 3 options: '3'"),
        ({"question": "q", "choices": OPTIONS, "answer": -1}, "names none of 3 options"),
        ({"question": "q", "choices": OPTIONS, "answer": True}, "names none of 3 options"),
        ({"question": "q", "choices": OPTIONS, "answer": "purple"}, "names none of 3 options"),
        ({"choices": OPTIONS, "answer": 0}, "'prompt' is missing"),
    ],
)
def test_rows_that_are_no_questions_are_named(tmp_path, row, says):
    with pytest.raises(InputError) as caught:
        read(tmp_path, {"question": "q", "choices": OPTIONS, "answer": 0}, row)
    assert says in caught.value.what
    assert caught.value.where.endswith("quiz.jsonl, line 2")
    assert caught.value.fix


def test_where_and_max_samples_choose_questions(tmp_path):
    rows = [{"question": f"q{i}", "choices": OPTIONS, "answer": 0, "kind": i % 2} for i in range(10)]
    kept = read(tmp_path, *rows, where={"kind": 1}, max_samples=3)
    assert len(kept) == 3
    assert all(int(row.prompt[1:]) % 2 for row in kept)
    with pytest.raises(InputError, match="is empty"):
        read(tmp_path)


def loaded(tmp_path, rows, **settings):
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Path(__file__).parents[2] / "fixtures" / "tiny-aligned"
    config = Config.model_validate(
        {
            "model": {"path": str(model)},
            "safety": "s",
            "finetune": "f",
            "probes": {"quiz": {"path": str(path), "measure": "choice", **settings}},
        }
    )
    parts = data_sets(config)["probes.quiz"]
    return load_set(config, "probes.quiz", parts, load_tokenizer(config.model))


def test_every_option_is_a_row_of_its_own(tmp_path):
    rows = [{"question": "how do i grow roses ?", "choices": OPTIONS, "answer": 1}] * 2
    found = loaded(tmp_path, rows)
    assert [row.row.response for row in found.rendered] == OPTIONS * 2
    assert len(found.questions) == 2
    assert len({row.response_start for row in found.rendered}) == 1


@pytest.mark.parametrize("truncation", ["auto", "keep_start", "drop"])
def test_an_option_that_is_cut_compares_with_nothing(tmp_path, truncation):
    long = " ".join(["plant tulips in sandy soil"] * 20)
    rows = [
        {"question": "how ?", "choices": ["yes", "no"], "answer": 0},
        {"question": "how ?", "choices": ["no", long], "answer": 0},
    ]
    with pytest.raises(InputError, match="does not fit into `max_length`") as caught:
        loaded(tmp_path, rows, max_length=24, truncation=truncation)
    assert caught.value.where.endswith("line 2")
