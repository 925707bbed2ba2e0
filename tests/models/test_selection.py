"""A new adapter is the one that peft makes of the same settings, and all of it that trains is selected."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from arisk.base.errors import ConfigError, MissingExtraError
from arisk.config.plan import AdapterConfig, ModelConfig
from arisk.models.loading import load_model
from arisk.models.selection import attach_adapter, lora_pairs, out_of_reach, select_parameters

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"


def model():
    return load_model(ModelConfig(path=str(FIXTURES / "tiny-aligned")), torch.device("cpu"))


def by_peft(**arguments):
    """The same adapter, made with peft alone."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(3)
        return peft.get_peft_model(model(), config)


#: What is set here, and what peft is given.
SETTINGS = {
    "rank and scale": ({"r": 4, "alpha": 32}, {"r": 4, "lora_alpha": 32, "target_modules": "all-linear"}),
    "rsLoRA": ({"use_rslora": True}, {"use_rslora": True}),
    "DoRA": ({"use_dora": True}, {"use_dora": True}),
    "biases": ({"bias": "all"}, {"bias": "all"}),
    "modules in full": ({"modules_to_save": ["lm_head"]}, {"modules_to_save": ["lm_head"]}),
    "ranks by module": (
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3.0}},
    ),
    "single parameters": (
        {"target_parameters": ["mlp.down_proj.weight"]},
        {"target_parameters": ["mlp.down_proj.weight"], "target_modules": []},
    ),
    "single layers": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ),
    "left out": ({"exclude_modules": ["down_proj"]}, {"exclude_modules": ["down_proj"]}),
    "start": ({"init_lora_weights": "gaussian"}, {"init_lora_weights": "gaussian"}),
    "peft's own targets": ({"target_modules": None}, {"target_modules": None}),
    "further keys": ({"peft": {"lora_bias": True}}, {"lora_bias": True}),
}


@pytest.mark.parametrize(("ours", "theirs"), SETTINGS.values(), ids=SETTINGS)
def test_settings_make_the_adapter_that_peft_makes_of_them(ours, theirs):
    made = attach_adapter(model(), AdapterConfig.model_validate(ours), seed=3)
    defaults = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
    expected = by_peft(**{**defaults, **theirs})
    tokens = torch.arange(12)[None]
    assert torch.equal(made(tokens).logits, expected(tokens).logits)
    pairs = zip(made.named_parameters(), expected.named_parameters(), strict=True)
    for (name, parameter), (other, value) in pairs:
        assert name == other
        assert torch.equal(parameter, value), name
        assert parameter.requires_grad == value.requires_grad, name
    assert select_parameters(made, "auto") == [n for n, p in expected.named_parameters() if p.requires_grad]


def test_only_products_of_two_matrices_count_as_pairs():
    plain = attach_adapter(model(), AdapterConfig(use_rslora=True, r=4, alpha=8), seed=0)
    pairs = lora_pairs(plain, select_parameters(plain, "auto"))
    assert {pair.scaling for pair in pairs} == {8 / 4**0.5}
    dora = attach_adapter(model(), AdapterConfig(use_dora=True), seed=0)
    assert not lora_pairs(dora, select_parameters(dora, "auto"))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"peft": {"use_dorra": True}}, "no LoRA setting 'use_dorra'"),
        ({"init_lora_weights": "eva"}, "computes the adapter's start from data"),
        ({"init_lora_weights": "nonsense"}, "peft refuses"),
        ({"target_parameters": ["nowhere.weight"]}, "peft refuses"),
        ({"modules_to_save": ["lm_head"], "target_modules": ["nothing"]}, "matches no linear module"),
    ],
)
def test_what_peft_refuses_is_an_error_with_its_place(settings, what):
    with pytest.raises(ConfigError, match=what) as caught:
        attach_adapter(model(), AdapterConfig.model_validate(settings), seed=0)
    assert caught.value.where.startswith("model.adapter")


def test_quantised_weights_need_bitsandbytes(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = ModelConfig(path=str(FIXTURES / "tiny-aligned"), adapter=AdapterConfig(), quantization="4bit")
    with pytest.raises(MissingExtraError, match="bitsandbytes") as caught:
        load_model(config, torch.device("cpu"))
    assert "arisk[quantization]" in caught.value.fix


def test_weights_that_no_adapter_reaches_are_told():
    made = attach_adapter(model(), AdapterConfig(target_modules=["q_proj"]), seed=0)
    base = model()
    sizes = {name: parameter.numel() for name, parameter in base.named_parameters()}
    reached = sum(size for name, size in sizes.items() if "q_proj" in name)
    share, largest = out_of_reach(made)
    assert share == pytest.approx(1 - reached / sum(sizes.values()))
    up = sum(size for name, size in sizes.items() if "up_proj" in name) / sum(sizes.values())
    assert dict(largest)["model.layers.*.mlp.up_proj"] == pytest.approx(up)
    with_head = AdapterConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    saved, _ = out_of_reach(attach_adapter(model(), with_head, seed=0))
    assert saved < share


def test_experts_in_one_tensor_are_out_of_reach_of_targets_by_name():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    )
    mixture = transformers.Qwen3MoeForCausalLM(config)
    sizes = {name: parameter.numel() for name, parameter in mixture.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name) / sum(sizes.values())
    by_name = AdapterConfig(r=2, target_modules=["q_proj", "v_proj"])
    share, largest = out_of_reach(attach_adapter(mixture, by_name, seed=0))
    assert share > experts
    found = sum(part for name, part in largest if ".experts." in name)
    assert found == pytest.approx(experts)
    mixture = transformers.Qwen3MoeForCausalLM(config)
    wanted = AdapterConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    _, rest = out_of_reach(attach_adapter(mixture, wanted, seed=0))
    assert not [name for name, _ in rest if ".experts." in name]
