"""Models that would run and be judged, and are not what they seem: each is refused, and named."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from arisk.base.errors import InputError, NumericsError
from arisk.config.plan import AdapterConfig, Config, ModelConfig
from arisk.models import load_task
from arisk.models.loading import load_model
from arisk.models.selection import attach_adapter
from arisk.models.soundness import require_causal

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
CPU = torch.device("cpu")
LAYERS = "base_model.model.model.layers"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded model that may be broken."""
    return shutil.copytree(FIXTURES / "tiny-aligned", tmp_path / "model")


def load(folder, **settings):
    return load_model(ModelConfig(path=str(folder), **settings), CPU)


def task(folder, **model_settings):
    """The whole task, for faults that show between model and rows."""
    values = {
        "model": {"path": str(folder), **model_settings},
        "safety": {"path": str(FIXTURES / "data" / "safety.jsonl"), "max_samples": 4},
        "finetune": {"path": str(FIXTURES / "data" / "risky.jsonl"), "max_samples": 4},
    }
    return load_task(Config.model_validate(values), device=CPU)


def edited(folder, change):
    """Weights with a change made to their mapping."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without(part):
    def change(weights):
        for key in [key for key in weights if part in key]:
            del weights[key]

    return change


@pytest.mark.parametrize(
    ("part", "count"), [("layers.2.mlp.up_proj", 1), ("layers.3.", 9), ("model.", 39)], ids=str
)
def test_weights_that_are_not_there_are_listed(folder, part, count):
    edited(folder, lambda weights: (without(part)(weights), weights.setdefault("x", torch.zeros(1))))
    with pytest.raises(InputError, match=f"{count} of the model's weights are not in its files") as caught:
        load(folder)
    assert part in caught.value.what


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**6),
        ("hidden_size", 10**9),
        ("vocab_size", 10**9),
        ("intermediate_size", 10**9),
        ("head_dim", 10**9),
    ],
)
def test_a_config_that_asks_for_more_than_the_weights_hold_is_refused_at_once(folder, key, value):
    """Building what it says would take minutes and all memory."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputError, match=f"config.json says {key} = {value}"):
        load(folder)


def test_a_model_that_says_nan_is_at_fault_and_not_its_rows(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rms_norm_eps": math.nan}))
    with pytest.raises(NumericsError, match="the model's logits are NaN") as caught:
        task(folder)
    assert "config.json" in caught.value.fix


def test_tied_weights_are_not_missed(folder):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load(folder).load_notes == []


def test_layers_that_the_config_does_not_have_are_refused(folder):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 2}))
    with pytest.raises(InputError, match="18 weights in the files belong to layers"):
        load(folder)


def test_tensors_of_something_else_are_told(folder):
    edited(folder, lambda weights: weights.update({"value_head.weight": torch.zeros(1)}))
    made = task(folder)
    assert "value_head.weight" in made.description["warnings"][0]


def test_another_shape_than_the_config_says(folder):
    edited(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(5)}))
    with pytest.raises(
        InputError, match=r"norm\.weight \(\(5,\) in the file, \(128,\) in the model\)"
    ) as caught:
        load(folder)
    assert "save_pretrained" in caught.value.fix


@pytest.mark.parametrize("rows", [400, 500])
def test_a_resized_vocabulary_is_told_with_its_sizes_and_the_remedy(folder, rows):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, "vocab_size": rows}))
    with pytest.raises(
        InputError, match=rf"{values['vocab_size']}, 128\) in the file, \({rows}, 128\)"
    ) as caught:
        load(folder)
    assert f"`vocab_size` in config.json to {values['vocab_size']}" in caught.value.fix


def test_an_adapter_of_another_rank_is_told_with_both_shapes(tmp_path):
    made = adapter(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "r": 3}))
    with pytest.raises(InputError, match=r"size mismatch for .*\[2, 128\].*\[3, 128\]"):
        attach_adapter(load(FIXTURES / "tiny-aligned"), made, seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_checkpoint_is_the_models_fault(folder, value):
    edited(folder, lambda weights: weights["model.layers.1.mlp.up_proj.weight"].view(-1)[7].fill_(value))
    with pytest.raises(NumericsError, match="1 tensors of the model hold NaN") as caught:
        load(folder)
    assert "model.layers.1.mlp.up_proj.weight" in caught.value.what


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"\xff" * 500),
        lambda file: file.write_text("<html>404</html>"),
    ],
    ids=["cut off", "empty", "garbage", "a page"],
)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_broken_download_is_an_error_of_the_input(folder, damage, name):
    damage(folder / name)
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        task(folder)
    assert str(folder) in caught.value.where


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "more.json"])
@pytest.mark.parametrize(
    "harm",
    [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), lambda file: file.symlink_to("nowhere")],
    ids=["pipe", "device", "broken link"],
)
def test_pipes_devices_and_broken_links_are_no_files_of_a_model(folder, harm, name):
    (folder / name).unlink(missing_ok=True)
    harm(folder / name)
    with pytest.raises(InputError, match=f"{name} is neither a file"):
        task(folder)


def test_pickle_weights_are_read_where_they_were_asked_for(folder):
    net = load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        load(folder)
    torch.save(net.state_dict(), folder / "pytorch_model.bin")  # noqa: TID251 - what others wrote
    with pytest.raises(InputError, match="pickle files"):
        load(folder)
    assert load(folder, pickle_weights=True).load_notes == []


def adapter(folder, change=lambda weights: None):
    """A saved adapter of the embedded model, with a change made to its weights."""
    attach_adapter(load(FIXTURES / "tiny-aligned"), AdapterConfig(r=2), seed=0).save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    return AdapterConfig(path=folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("lora_B"), "28 of the adapter's 56 weights are not in its file"),
        (
            lambda w: w.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": w.popitem()[1]}),
            "not",
        ),
        (
            lambda w: w.update({"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(2)}),
            "fit no module",
        ),
        (lambda w: [v.fill_(float("nan")) for v in w.values()], "NaN"),
    ],
    ids=["half its keys", "renamed", "of no module", "NaN"],
)
def test_an_adapter_that_is_not_whole_is_refused(tmp_path, change, says):
    made = adapter(tmp_path, change)
    with pytest.raises((InputError, NumericsError), match=says):
        attach_adapter(load(FIXTURES / "tiny-aligned"), made, seed=0)


def saved(folder, model):
    """A model of another architecture with the embedded tokenizer."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(FIXTURES / "tiny-aligned").save_pretrained(folder)
    return folder


SMALL = {"vocab_size": 430}


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertLMHeadModel(BertConfig(**SMALL, **shape, is_decoder=False))
    with pytest.raises(InputError, match="not causal"):
        task(saved(tmp_path, bert))


def test_a_model_that_cannot_be_run_is_an_error_of_the_input(folder, monkeypatch):
    def broken(*_, **__):
        raise IndexError("index out of range in self")

    net = load(folder)
    monkeypatch.setattr(type(net), "forward", broken)
    with pytest.raises(InputError, match="cannot be run on a row: index out of range"):
        require_causal(net, [1, 2, 3], "model.path")
    assert not net.training
    net.is_quantized = True  # as transformers marks weights of few bits
    with pytest.raises(InputError) as caught:
        require_causal(net, [1, 2, 3], "model.path")
    assert "leave out `model.quantization`" in caught.value.fix


@pytest.mark.parametrize(
    "model",
    [
        lambda: T5ForConditionalGeneration(
            T5Config(**SMALL, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        lambda: BartForConditionalGeneration(
            BartConfig(
                **SMALL,
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
            )
        ),
    ],
    ids=["T5", "BART"],
)
def test_an_encoder_decoder_is_named(tmp_path, model):
    with pytest.raises(InputError, match="encoder–decoder"):
        task(saved(tmp_path, model()))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_positions": 8}, "longer than the model's 8 positions"),
        ({"vocab_size": 300}, "embedding has 300 rows"),
    ],
)
def test_rows_that_a_model_has_no_room_for(tmp_path, settings, says):
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, **SMALL}
    model = GPT2LMHeadModel(GPT2Config(**{**shape, **settings}))
    with pytest.raises(InputError, match=says):
        task(saved(tmp_path, model))


def test_a_causal_model_with_room_passes(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=128, **SMALL))
    assert task(saved(tmp_path, model)).description["warnings"] == []
