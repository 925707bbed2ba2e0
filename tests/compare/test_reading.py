"""Which runs may stand in one table, what differs between their plans, and what they are called."""

from pathlib import Path

import pytest

from arisk.anatomy.stage import COLLECT
from arisk.base.errors import ArtifactError
from arisk.compare.reading import (
    differing_settings,
    distinct_names,
    notes,
    refuse_different_safety,
    same_plans,
)
from arisk.config.plan import Config
from arisk.engine.fingerprints import DigestCache, input_fingerprints
from arisk.engine.freshness import ingredients_of
from tests.compare.plans import plan


@pytest.fixture
def values(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("safety", "finetune", "other"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    sets = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("safety", "finetune")}
    return {"model": {"path": str(tmp_path / "model")}, **sets}


def side(values, **sections):
    """Ingredients of collect for the values with some sections changed."""
    merged = {**values, **{name: {**values.get(name, {}), **more} for name, more in sections.items()}}
    config = Config.model_validate(merged)
    inputs = input_fingerprints(config, DigestCache(Path("no-such-cache")))
    return ingredients_of(COLLECT, config, inputs, {})


def test_equal_contents_are_one_safety_side_wherever_they_lie(values, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text("safety")
    sides = {
        "a": side(values),
        "b": side(values, safety={"path": str(copy)}, forecast={"confidence": 0.5}, run={"device": "cpu"}),
    }
    assert refuse_different_safety(sides) == []


@pytest.mark.parametrize(
    ("sections", "what"),
    [
        ({"model": {"dtype": "float64"}}, "model.dtype (float32 against float64)"),
        ({"safety": {"max_length": 64}}, "safety.max_length (1024 against 64)"),
        ({"collect": {"fisher": "sampled"}}, "collect.fisher (empirical against sampled)"),
        ({"run": {"seed": 7}}, "seed (0 against 7)"),
    ],
)
def test_what_differs_is_named_with_both_values(values, sections, what):
    with pytest.raises(ArtifactError) as caught:
        refuse_different_safety({"a": side(values), "b": side(values, **sections)})
    assert what in caught.value.what
    assert caught.value.where == "a against b"


@pytest.mark.parametrize(
    "models",
    [
        ({}, {"adapter": {"r": 4}}),
        ({"adapter": {"r": 8}}, {"adapter": {"r": 4}}),
        ({}, {"parameters": {"include": ["*.bias"]}}),
    ],
)
def test_what_trains_may_differ_and_is_said(values, models):
    one, two = (side(values, model=model) for model in models)
    (said,) = refuse_different_safety({"a": one, "b": two})
    assert said.startswith("b trains something else than a (model.")
    assert "start from the same model" in said
    assert "not shared" in said
    with pytest.raises(ArtifactError, match=r"model\.dtype"):
        refuse_different_safety({"a": one, "b": side(values, model={**models[1], "dtype": "float64"})})


def test_an_adapter_that_exists_already_is_another_model(values, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    other = side(values, model={"adapter": {"path": str(tmp_path)}})
    with pytest.raises(ArtifactError, match="the adapter's files differ"):
        refuse_different_safety({"a": side(values), "b": other})


def test_other_files_are_named_in_words(values, tmp_path):
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "config.json").write_text("{ }")
    other = side(
        values, model={"path": str(tmp_path / "second")}, safety={"path": str(tmp_path / "other.jsonl")}
    )
    with pytest.raises(ArtifactError, match="the model's files differ; the safety rows differ"):
        refuse_different_safety({"a": side(values), "b": other})


def test_another_way_to_measure_the_same_side_is_said_and_allowed(values):
    (said,) = refuse_different_safety({"a": side(values), "b": side(values, collect={"chunk_size": 2})})
    assert "b measured the safety side in another way than a (collect.chunk_size (8 against 2))" in said


def test_settings_that_differ_leave_out_where_a_run_lives(values):
    one = Config.model_validate({**values, "run": {"threads": 1}, "report": {"title": "x"}})
    two = Config.model_validate({**values, "training": {"learning_rate": 1e-3}})
    assert differing_settings({"a": one, "b": two}) == {"training.learning_rate": ["0.0002", "0.001"]}
    assert differing_settings({"a": one, "b": one}) == {}


def test_another_path_of_the_same_file_is_no_difference():
    def config(name):
        sets = {key: {"path": f"{name}/{key}.jsonl"} for key in ("safety", "finetune", "control")}
        return Config.model_validate({"model": {"path": f"{name}/model"}, **sets})

    read = {"model": {"config.json": "a"}, "control": {"rows": "b"}, "finetune": {"rows": "c"}}
    plans = {"a": config("here"), "b": config("there")}
    other = read | {"finetune": {"rows": "d"}}
    assert set(differing_settings(plans, [read, other])) == {"safety.path", "finetune.path"}


def test_long_paths_keep_their_end():
    def config(path):
        sets = {name: {"path": path} for name in ("safety", "finetune")}
        return Config.model_validate({"model": {"path": "m"}, **sets})

    found = differing_settings({"a": config("d/" * 60 + "one.jsonl"), "b": config("d/" * 60 + "two.jsonl")})
    assert [value[-9:] for value in found["finetune.path"]] == ["one.jsonl", "two.jsonl"]


def test_names_are_as_short_as_they_can_be_told_apart():
    assert distinct_names([Path("runs/a"), Path("runs/b")]) == ["a", "b"]
    assert distinct_names([Path("x/run"), Path("y/run"), Path("z/b")]) == ["x/run", "y/run", "b"]
    assert distinct_names([Path("p/x/run"), Path("q/x/run")]) == ["p/x/run", "q/x/run"]


def test_notes_say_what_makes_numbers_less_comparable():
    runs = [plan("a"), plan("b", threshold=0.3, horizon=50)]
    said = " ".join(notes(runs, {"control.path": ["x", "y"]}))
    assert "collapse threshold is not the same in all runs: a 0.1 nats/token, b 0.3 nats/token" in said
    assert "number of planned steps is not the same in all runs: a 100, b 50" in said
    assert "control data are not the same" in said
    assert notes([plan("a"), plan("b")], {}) == []


def test_one_plan_run_twice_is_said():
    assert same_plans({"a": "1", "b": "2", "c": "1"}) == [
        "a and c are the same plan: their forecasts are equal."
    ]
