from pathlib import Path

import pytest
import yaml

from arisk.base.errors import ConfigError
from arisk.config.plan import Config
from arisk.config.python import PipelineConfig
from arisk.config.yaml import (
    dump_config,
    json_schema,
    load_config,
    run_directory,
    starter_config,
    validate_mapping,
)

MINIMAL = "model: {path: m}\nsafety: {path: s.jsonl}\nfinetune: {path: f.jsonl}\n"


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def problems(path, overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return [caught.value, *caught.value.also]


def test_minimal_config_has_every_default(config_file):
    config = load_config(config_file)
    assert config.training.optimizer == "adamw"
    assert config.forecast.collapse_threshold == 0.1
    assert yaml.safe_load(dump_config(config))["model"]["path"] == "m"


def test_set_overrides_nested_values_and_reads_exponents(config_file):
    config = load_config(config_file, ["training.learning_rate=3e-5", "model.adapter.r=4", "run.seed=7"])
    assert config.training.learning_rate == 3e-5
    assert config.model.adapter is not None
    assert config.model.adapter.r == 4
    assert config.run.seed == 7


@pytest.mark.parametrize(
    ("override", "where", "fix"),
    [
        ("trainin.max_steps=3", "trainin", "training"),
        ("training.learning_rat=1", "training.learning_rat", "learning_rate"),
        ("model.adapter.targets=x", "model.adapter.targets", "target_modules"),
        ("training.optimizer=adam", "training.optimizer", "'adamw'"),
        ("training.learning_rate=-1", "training.learning_rate", "Peak"),
        ("training.learning_rate=.inf", "training.learning_rate", "Peak"),
        ("training.betas=[0.9]", "training.betas.1", ""),
        ("training.max_steps=0", "training.max_steps", "Optimizer steps"),
        ("training.max_steps=1.5", "training.max_steps", "Optimizer steps"),
        ("model.parameters=some", "model.parameters", "'lora'"),
        ("model.path=null", "model", ""),
        ("safety=null", "(top level)", ""),
        ("forecast.elevated_probability=0.9", "forecast", ""),
        ("safety.chat_template=maybe", "safety.chat_template", ""),
        ("run.dir=[1]", "run.dir", ""),
        ("model={source: python, entry: 'a:b', gradient_checkpointing: true}", "model", ""),
    ],
)
def test_each_mistake_names_its_place_and_a_remedy(config_file, override, where, fix):
    (problem,) = problems(config_file, [override])
    assert problem.where == f"{config_file}: {where}"
    assert fix in problem.fix
    assert problem.fix
    assert problem.exit_code == 2


def test_all_mistakes_are_listed_at_once(config_file):
    found = problems(
        config_file, ["trainin.x=1", "training.optimizer=adam", "score.nulls=-1", "run.threads=0"]
    )
    assert len(found) == 4
    assert len("\n".join(found[0].lines()).splitlines()) == 12


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "empty"),
        ("- 1\n", "list"),
        ("a: [1\n", "YAML"),
        ("model: {path: a}\nmodel: {path: b}\n", "given twice"),
        ("\x00", "YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, what):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    (problem,) = problems(path, [])
    assert what in problem.what


def test_missing_file_and_binary_file(tmp_path):
    assert "does not exist" in problems(tmp_path / "no.yaml", [])[0].what
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problems(tmp_path / "b.yaml", [])[0].what


@pytest.mark.parametrize("item", ["novalue", "=3", "training.optimizer.deep=3", "a=[1"])
def test_bad_overrides(config_file, item):
    assert problems(config_file, ["training.optimizer=sgd", item])[0].where == f"--set {item}"


def test_relative_paths_are_looked_up_beside_the_config(tmp_path, config_file):
    (tmp_path / "s.jsonl").write_text("{}")
    config = load_config(config_file)
    assert config.safety is not None
    assert config.finetune is not None
    assert config.safety.path == str((tmp_path / "s.jsonl").resolve())
    assert config.finetune.path == "f.jsonl"


def test_starter_config_loads_and_shows_every_key(tmp_path):
    text = starter_config("some/model", "a.jsonl", "b.jsonl")
    path = tmp_path / "start.yaml"
    path.write_text(text)
    assert load_config(path).model.path == "some/model"
    for name, field in Config.model_fields.items():
        assert f"{name}:" in text
        assert (field.description or "?") in text


def test_every_field_is_documented_in_the_schema():
    schema = json_schema()
    for name, definition in schema["$defs"].items():
        for key, value in definition["properties"].items():
            assert value.get("description"), f"{name}.{key}"


def test_python_dicts_are_validated_like_yaml():
    config = validate_mapping(PipelineConfig, {"training": {"learning_rate": 1e-3}}, "PipelineConfig")
    assert config.training.learning_rate == 1e-3
    with pytest.raises(ConfigError, match="unknown key `trainin`"):
        validate_mapping(PipelineConfig, {"trainin": {}}, "PipelineConfig")


def test_pipeline_config_refuses_like_yaml():
    config = PipelineConfig(
        training={"betas": [0.9, 0.99], "max_steps": 600}, forecast={"collapse_threshold": 0.2}
    )
    assert config.training.betas == (0.9, 0.99)
    with pytest.raises(ConfigError) as caught:
        PipelineConfig(training={"learning_rat": 1}, forecast={"confidence": 2}, mod="lora")
    problems = [caught.value, *caught.value.also]
    assert len(problems) == 3
    assert "did you mean `learning_rate`?" in {problem.fix for problem in problems}


def test_run_directory_order(config_file, tmp_path):
    config = load_config(config_file)
    assert run_directory(config, config_file, None) == Path("runs/run")
    assert run_directory(load_config(config_file, ["run.dir=x"]), config_file, None) == Path("x")
    assert run_directory(config, config_file, tmp_path) == tmp_path


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_shipped_config_loads_and_opens_with_its_command(path):
    load_config(path)
    assert "arisk run configs/" + path.name in path.read_text().splitlines()[0]


def test_a_run_directory_in_place_of_a_config_says_where_its_own_is(tmp_path):
    (found,) = problems(tmp_path, [])
    assert "folder" in found.what
    assert str(tmp_path / "config.yaml") in found.fix
