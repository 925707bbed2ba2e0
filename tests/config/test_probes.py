"""Probes in a config: names, paths, measures, and what is refused."""

import pytest

from arisk.base.errors import ConfigError
from arisk.config.plan import Config, data_sets
from arisk.config.starter import full_config
from arisk.config.yaml import json_schema, known_keys, load_config

HEAD = "model: {path: m}\nsafety: {path: s.jsonl}\nfinetune: {path: f.jsonl}\n"


def written(folder, text):
    path = folder / "c.yaml"
    path.write_text(HEAD + text)
    return path


def test_probes_are_data_sets_by_name_with_the_names_of_other_tools(tmp_path):
    (tmp_path / "maths.jsonl").write_text("")
    (tmp_path / "quiz.jsonl").write_text("")
    text = """
probes:
  maths: maths.jsonl
  two words: {dataset_name: quiz.jsonl, max_seq_length: 64, measure: choice, max_samples: 3}
"""
    config = load_config(written(tmp_path, text))
    assert config.probes["maths"].path == str(tmp_path / "maths.jsonl")
    assert config.probes["maths"].measure == "nll"
    quiz = config.probes["two words"]
    assert (quiz.path, quiz.max_length, quiz.measure) == (str(tmp_path / "quiz.jsonl"), 64, "choice")
    assert list(data_sets(config)) == ["safety", "finetune", "probes.maths", "probes.two words"]
    other = load_config(
        written(tmp_path, text), ["probes.maths=quiz.jsonl", "probes.two words.max_length=32"]
    )
    assert other.probes["maths"].path == str(tmp_path / "quiz.jsonl")
    assert other.probes["two words"].max_length == 32


def test_without_probes_there_are_none(tmp_path):
    config = load_config(written(tmp_path, ""))
    assert config.probes == {}
    assert list(data_sets(config)) == ["safety", "finetune"]


@pytest.mark.parametrize(
    ("text", "where", "says"),
    [
        ("probes: {a: {path: x, measure: speed}}", "probes.a.measure", "choice"),
        ("probes: {a: {path: x, mesure: nll}}", "probes.a.mesure", "measure"),
        ("probes: {a: {measure: nll}}", "probes.a.path", ""),
        ("probes: {a: x, a: y}", "c.yaml", "twice"),
        ("probes: {'a/b': x}", "probes", ""),
        ("probes: {a: {path: x, measure: choice, format: alpaca}}", "probes.a", "layout of their own"),
        ("probes: {a: {path: x, answer_column: y}}", "probes.a", "are for `measure: choice`"),
        ("probes: [x]", "probes", ""),
    ],
)
def test_mistakes_name_their_place(tmp_path, text, where, says):
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    assert where in caught.value.where
    assert says in f"{caught.value.what} {caught.value.fix}"
    assert caught.value.fix


def test_a_python_task_brings_its_own(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {source: python, entry: 'a:b'}\nprobes: {a: x}\n")
    with pytest.raises(ConfigError, match=r"Task\.probes"):
        load_config(path)


def test_schema_completion_and_the_full_plan_know_them(tmp_path):
    fields = json_schema()["$defs"]["ProbeConfig"]["properties"]
    assert {"measure", "options_column", "dataset_name", "max_seq_length"} <= set(fields)
    assert "probes" in known_keys()
    text = full_config("m", "s.jsonl", "f.jsonl")
    assert "  # NAME:\n    # path: …" in text
    path = tmp_path / "full.yaml"
    path.write_text(text)
    assert load_config(path).probes == {}
    # What stands there as a comment is a config where its marks are taken away.
    lines = text.splitlines()
    start = lines.index("# probes:")
    shown = [line for line in lines[start : start + 40] if "measure:" in line or "NAME:" in line]
    body = "\n".join(["probes:", *(line.replace("# ", "", 1) for line in shown), "    path: x"])
    path.write_text(HEAD + body)
    assert load_config(path).probes["NAME"].measure == "nll"


def test_values_survive_a_resolved_config():
    given = {"a": {"path": "x", "measure": "choice", "options_column": "endings"}}
    config = Config.model_validate({"model": {"path": "m"}, "safety": "s", "finetune": "f", "probes": given})
    assert Config.model_validate(config.model_dump(mode="json")) == config
