import os
import shutil
from pathlib import Path

import pytest
import yaml

from arisk.base.errors import ConfigError
from arisk.config.plan import DataConfig, data_sets
from arisk.config.python import PipelineConfig
from arisk.config.yaml import (
    dump_config,
    json_schema,
    load_config,
    run_directory,
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
        ("training.optimizer=adam", "training.optimizer", "adamw"),
        ("training.schedule=greedy", "training.schedule", "constant"),
        ("training.schedule=cosin", "training.schedule", "cosine"),
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
        ("guard.constrained.strengths=0", "guard.constrained.strengths", ""),
        ("guard.constrained.first=-1", "guard.constrained.first", ""),
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
    "path", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_shipped_config_loads_and_opens_with_its_command(path):
    load_config(path)
    assert "arisk run configs/" + path.name in path.read_text().splitlines()[0]


def test_a_run_directory_stands_for_its_own_config(config_file, tmp_path):
    run = tmp_path / "runs" / "my"
    run.mkdir(parents=True)
    shutil.copy(config_file, run / "config.yaml")
    assert load_config(run, ["run.seed=7"]).run.seed == 7
    config = load_config(run)
    assert config == load_config(run / "config.yaml")
    assert run_directory(config, run, None) == run
    assert run_directory(config, run, tmp_path) == tmp_path


def test_a_folder_that_is_no_run_directory_is_one_clear_error(tmp_path):
    (found,) = problems(tmp_path, [])
    assert found.what == "this folder is no run directory: it has no config.yaml"
    assert (found.where, "YAML file of a plan" in found.fix) == (str(tmp_path), True)
    stage = tmp_path / "rollout"
    stage.mkdir()
    (stage / "manifest.json").touch()
    (found,) = problems(stage, [])
    assert found.what == "this is the stage rollout of a run, not a run"
    assert found.fix == f"give {tmp_path}"


CASES = {
    "an integer of 5000 digits": ("run: {seed: " + "9" * 5000 + "}", "no int"),
    "a date that is none": ("run: {dir: 2024-13-01}", "no timestamp"),
    "deep nesting": ("[" * 3000, "nested more than"),
    "a tag that does not fit": ("training: {max_steps: !!int abc}", "no int"),
    "a truth value that is none": ("a: !!bool maybe", "no bool"),
    "a key that is a mapping": ("model:\n  {a: 1}: 2\n", "a key must be one word"),
    "a key that is a list": ("? [1, 2]\n: 3\n", "a key must be one word"),
    "a value that holds itself": ("a: &a [*a]\n", "holds itself"),
    "aliases that grow": (
        "a: &a [x, x, x, x, x, x, x, x, x]\n"
        + "".join(
            f"{here}: &{here} [{', '.join([f'*{before}'] * 9)}]\n"
            for before, here in zip("abcdefgh", "bcdefghi", strict=True)
        ),
        "more than",
    ),
    "aliases that nest": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 500)),
        "more than",
    ),
    "a foreign object": ("a: !!python/object/apply:os.system [ls]", "constructor"),
}


@pytest.mark.parametrize(("text", "what"), CASES.values(), ids=CASES)
def test_faults_of_yaml_have_a_line_and_a_remedy(tmp_path, config_file, text, what):
    path = tmp_path / "bad.yaml"
    path.write_text(f"# a comment\n{text}")
    (problem,) = problems(path, [])
    assert what in problem.what
    assert problem.where.startswith(f"{path}, line ")
    assert len("".join(problem.lines())) < 700
    if "\n" not in text.strip():
        assert problem.where == f"{path}, line 2"
        (of_option,) = problems(config_file, [f"run={text}"])
        assert what in of_option.what
        assert of_option.where.startswith("--set run=")


def test_merged_mappings_are_read(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text(
        "safety: &rows {path: s, max_length: 64}\nfinetune: {<<: *rows, path: f}\nmodel: {path: m}"
    )
    finetune = load_config(path).finetune
    assert finetune is not None
    assert (finetune.path, finetune.max_length) == ("f", 64)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "x" * 300, "a\0b", "a/" * 3000])
def test_paths_that_are_no_config_are_told_at_once(name):
    (problem,) = problems(Path(name), [])
    assert "config file" in problem.what
    assert len("".join(problem.lines())) < 600


def test_a_pipe_and_a_large_file_are_no_config(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in problems(tmp_path / "pipe", [])[0].what
    with (tmp_path / "large").open("wb") as file:
        file.truncate(10**10)
    assert "too many" in problems(tmp_path / "large", [])[0].what


@pytest.mark.parametrize(
    ("override", "where"),
    [
        (f"{key}={value}", key)
        for key, values in {
            "training.learning_rate": ("1e300", "1e-300", "1e-40", "1" + "0" * 400, ".nan"),
            "run.seed": (str(2**63), "-1", "1" + "0" * 400),
            "safety.seed": (str(2**63),),
            "run.threads": ("100000000000",),
            "run.device": ("meta", "'meta:0'"),
            "training.batch_size": ("1000000000000",),
            "training.gradient_accumulation": ("1000000000",),
            "training.epochs": ("1e300", "1" + "0" * 400),
            "training.warmup_steps": ("1000000000000",),
            "score.nulls": ("1000000000000",),
            "forecast.bootstrap_samples": ("1000000000000",),
            "model.adapter.r": ("100000000",),
            "finetune.path": ("''", "'  '", '"a\\0b"', '"\\ud800"', "x" * 300, "a/" * 3000),
            "run.dir": ("''", '"a\\0b"', "y" * 300),
            "model.path": ("''",),
            "model.adapter.path": ("''",),
        }.items()
        for value in values
    ],
)
def test_values_beyond_all_measure_are_refused_before_any_work(config_file, override, where):
    (problem,) = problems(config_file, [override])
    assert problem.where == f"{config_file}: {where}"
    assert len("".join(problem.lines())) < 600


def test_a_home_that_is_nobodys_is_left_to_those_who_open_it(config_file):
    config = load_config(config_file, ["finetune.path=~nobody-has-this-name/rows.jsonl"])
    assert config.finetune is not None
    assert config.finetune.path == "~nobody-has-this-name/rows.jsonl"


def test_data_sets_as_paths_and_as_lists(tmp_path):
    for name in ("s", "a", "b"):
        (tmp_path / f"{name}.jsonl").touch()
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {path: m}\nsafety: s.jsonl\ncontrol: no-such\n"
        "finetune: [a.jsonl, {path: b.jsonl, max_samples: 3, weight: 0.5}]\n"
    )
    config = load_config(path)
    assert config.safety == DataConfig(path=str(tmp_path / "s.jsonl"))
    assert config.control == DataConfig(path="no-such")
    assert config.finetune == (
        DataConfig(path=str(tmp_path / "a.jsonl")),
        DataConfig(path=str(tmp_path / "b.jsonl"), max_samples=3, weight=0.5),
    )
    assert [len(parts) for parts in data_sets(config).values()] == [1, 2, 1]
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config
    one = load_config(path, ["finetune=[a.jsonl]"])
    assert one.finetune == config.finetune[0]


def test_mistakes_in_a_list_of_data_sets_have_their_place(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: m}\nsafety: s\nfinetune: [{path: a, fornat: x}, {split: b}, '']\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    found = [caught.value, *caught.value.also]
    assert [problem.where.rpartition(": ")[2] for problem in found] == [
        *("finetune.0.fornat", "finetune.1.path", "finetune.2.path")
    ]
    assert found[0].fix == "did you mean `format`?"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"\\udfff x": 1}', "a key in config"),
        ('{"guard": {"methods": {"\\ud800": 1}}}', "a key in guard.methods"),
        ('{"guard": {"methods": ["plain", "\\udfff x"]}}', "guard.methods.1"),
        ('{"run": {"name": "a\\ud800"}}', "run.name"),
    ],
)
def test_half_a_character_anywhere_is_one_error(tmp_path, text, place):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="half of a character") as caught:
        load_config(path)
    assert caught.value.where == f"{path}: {place}"
