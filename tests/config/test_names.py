"""Names of transformers and peft in arisk's own YAML."""

import pytest

from arisk.base.errors import ConfigError
from arisk.config.python import PipelineConfig
from arisk.config.yaml import json_schema, load_config

MINIMAL = "safety: {path: s.jsonl}\nfinetune: {path: f.jsonl}\n"


def loaded(tmp_path, text, overrides=()):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + text)
    return load_config(path, overrides)


def test_the_names_of_the_trainer(tmp_path):
    config = loaded(
        tmp_path,
        """
model:
  model_name_or_path: m
  torch_dtype: torch.bfloat16
  adapter: {lora_r: 4, lora_alpha: 12, lora_dropout: 0.1, lora_target_modules: [q_proj]}
training:
  num_train_epochs: 2
  per_device_train_batch_size: 3
  gradient_accumulation_steps: 5
  lr_scheduler_type: cosine
  warmup_ratio: 0.1
  optim: adamw_torch
  bf16: true
  adam_beta2: 0.95
  max_grad_norm: 0.5
  max_steps: -1
""",
    )
    adapter, training = config.model.adapter, config.training
    assert adapter is not None
    assert (config.model.path, config.model.dtype) == ("m", "bfloat16")
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.target_modules) == (4, 12, 0.1, ["q_proj"])
    assert (training.epochs, training.batch_size, training.gradient_accumulation) == (2, 3, 5)
    assert (training.schedule, training.warmup_ratio, training.optimizer) == ("cosine", 0.1, "adamw_torch")
    assert (training.precision, training.betas, training.max_grad_norm) == ("bf16", (0.9, 0.95), 0.5)
    assert training.max_steps is None


def test_a_share_of_warmup_steps_is_a_ratio(tmp_path):
    training = loaded(tmp_path, "model: {path: m}\ntraining: {warmup_steps: 0.05}\n").training
    assert (training.warmup_steps, training.warmup_ratio) == (0, 0.05)


@pytest.mark.parametrize(
    ("given", "packing"),
    [
        ("off", "off"),
        ("wrapped", "wrapped"),
        ("false", "off"),
        ("true", "bfd"),
        ("true, packing_strategy: wrapped", "wrapped"),
        ("false, packing_strategy: wrapped", "off"),
    ],
)
def test_packing_as_yaml_and_trl_write_it(tmp_path, given, packing):
    """A plain `off` is false in YAML."""
    assert loaded(tmp_path, f"model: {{path: m}}\ntraining: {{packing: {given}}}").training.packing == packing
    assert loaded(tmp_path, "model: {path: m}", ["why=off"]).why == "off"


@pytest.mark.parametrize(
    "text",
    [
        "training: {num_train_epochs: 3, epochs: 2}",
        "training: {bf16: true, fp16: true}",
        "training: {bf16: true, precision: fp16}",
        "training: {betas: [0.9, 0.99], adam_beta2: 0.95}",
        "training: {optim: sgd, optimizer: adamw}",
    ],
)
def test_two_names_with_two_values_are_an_error(tmp_path, text):
    with pytest.raises(ConfigError, match="contradict") as caught:
        loaded(tmp_path, f"model: {{path: m}}\n{text}\n")
    assert caught.value.where.endswith(": training")


def test_two_names_with_one_value_are_none(tmp_path):
    text = "model: {path: m}\ntraining: {num_train_epochs: 3, epochs: 3, bf16: false, fp16: true}\n"
    training = loaded(tmp_path, text).training
    assert (training.epochs, training.precision) == (3, "fp16")


def test_set_wins_over_the_file_under_either_name(tmp_path):
    text = "model: {path: m}\ntraining: {num_train_epochs: 3, batch_size: 4}\n"
    given = ["training.epochs=2", "training.per_device_train_batch_size=8"]
    training = loaded(tmp_path, text, given).training
    assert (training.epochs, training.batch_size) == (2, 8)


def test_a_slip_in_a_foreign_name_is_told(tmp_path):
    with pytest.raises(ConfigError, match="num_train_epoch") as caught:
        loaded(tmp_path, "model: {path: m}\ntraining: {num_train_epoch: 3}\n")
    assert "num_train_epochs" in caught.value.fix


def test_the_schema_and_python_know_them():
    assert "num_train_epochs" in json_schema()["$defs"]["TrainingConfig"]["properties"]
    assert "lora_alpha" in json_schema()["$defs"]["AdapterConfig"]["properties"]
    config = PipelineConfig(training={"num_train_epochs": 4, "optim": "sgd"})
    assert (config.training.epochs, config.training.optimizer) == (4, "sgd")
    config.training.batch_size = 2
    assert config.training.batch_size == 2


def test_relative_paths_under_foreign_names_are_looked_up_beside_the_config(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {model_name_or_path: model}\nsafety: {path: s}\nfinetune: {dataset_name: rows.jsonl}\n"
    )
    config = load_config(path)
    assert config.model.path == str(tmp_path / "model")
    assert config.finetune is not None
    assert not isinstance(config.finetune, tuple)
    assert config.finetune.path == str(tmp_path / "rows.jsonl")
