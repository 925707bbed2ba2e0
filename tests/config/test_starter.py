"""What `arisk init` writes."""

from arisk.config.plan import Config
from arisk.config.starter import full_config, short_config
from arisk.config.yaml import load_config


def test_the_short_plan_is_one_that_people_run(tmp_path):
    text = short_config("some/model", "a: strange name.jsonl", "b.jsonl")
    assert 20 <= len(text.splitlines()) <= 32
    path = tmp_path / "start.yaml"
    path.write_text(text)
    config = load_config(path)
    assert config.model.path == "some/model"
    assert config.safety is not None
    assert config.safety.path == "a: strange name.jsonl"
    training = config.training
    assert config.model.adapter is not None
    assert (training.schedule, training.warmup_ratio, training.max_grad_norm) == ("cosine", 0.03, 1.0)
    assert training.epochs is not None


def test_the_full_plan_shows_every_key(tmp_path):
    text = full_config("some/model", "a.jsonl", "b.jsonl")
    path = tmp_path / "start.yaml"
    path.write_text(text)
    assert load_config(path).model.path == "some/model"
    for name, field in Config.model_fields.items():
        assert f"{name}:" in text
        assert (field.description or "?") in text


def test_prompts_alone_are_named_as_such(tmp_path):
    for write in (short_config, full_config):
        path = tmp_path / "start.yaml"
        path.write_text(write("some/model", "prompts.txt", "b.jsonl", alone=True))
        safety = load_config(path).safety
        assert safety is not None
        assert (safety.path, safety.format) == ("prompts.txt", "prompts")
