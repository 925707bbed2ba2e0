from pathlib import Path

import pytest
import torch
from torch import nn

from arisk.anatomy.collect import collect
from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import AdapterConfig, CollectConfig, Config, ModelConfig, ParameterGlobs
from arisk.gradients import choose_engine, layout_of, mean_gradient, measuring
from arisk.models import load_task
from arisk.models.loading import load_model, mark_recomputed
from arisk.models.selection import attach_adapter, lora_pairs, select_parameters
from arisk.models.tasks import task_from_entry

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
CPU = torch.device("cpu")


def model():
    return load_model(ModelConfig(path=str(FIXTURES / "tiny-aligned")), CPU)


def config(**model_settings):
    files = {name: {"path": str(FIXTURES / "data" / f"{name}.jsonl")} for name in ("safety", "control")}
    return Config.model_validate(
        {
            "model": {"path": str(FIXTURES / "tiny-aligned"), **model_settings},
            "finetune": {"path": str(FIXTURES / "data" / "risky.jsonl")},
            **files,
        }
    )


def test_full_selects_every_parameter_once():
    net = model()
    names = select_parameters(net, "full")
    assert names == [name for name, _ in net.named_parameters()]
    assert "lm_head.weight" not in names  # tied to the embedding


def test_globs():
    net = model()
    names = select_parameters(net, ParameterGlobs(include=["*mlp*"], exclude=["*down_proj*"]))
    assert names
    assert all("mlp" in name and "down_proj" not in name for name in names)
    with pytest.raises(ConfigError, match="exclude patterns leave"):
        select_parameters(net, ParameterGlobs(include=["*mlp*"], exclude=["*"]))


def test_a_new_adapter_is_repeatable_and_leaves_the_random_state():
    state = torch.get_rng_state()
    first = attach_adapter(model(), AdapterConfig(r=4), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    second = attach_adapter(model(), AdapterConfig(r=4), seed=1)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    names = select_parameters(first, "auto")
    assert all("lora_" in name for name in names)
    pairs = lora_pairs(first, names)
    assert len(pairs) * 2 == len(names) == 56
    assert pairs[0].scaling == 16 / 4


def test_an_existing_adapter_is_loaded(tmp_path):
    made = attach_adapter(model(), AdapterConfig(r=2), seed=0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.25)
    made.save_pretrained(tmp_path)
    task = load_task(config(adapter=str(tmp_path)), device=CPU)
    parameters = dict(task.model.named_parameters())
    assert all("lora_" in name for name in task.parameter_names)
    assert all(float(parameters[n].detach().mean()) == 0.25 for n in task.parameter_names if "lora_B" in n)


@pytest.mark.parametrize("adapter", [None, {"r": 2}])
def test_a_model_dispatched_over_devices_has_the_same_gradients(tmp_path, adapter):
    from accelerate import dispatch_model
    from accelerate.hooks import AlignDevicesHook

    places = dict.fromkeys(("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb"), "cpu")
    places |= {f"model.layers.{i}": "cpu" for i in range(4)}
    values = config(dtype="float64", **({} if adapter is None else {"adapter": adapter})).model_dump()
    values["safety"]["max_samples"] = 6
    task = load_task(Config.model_validate(values), device=CPU)
    whole = collect(task, CollectConfig(), tmp_path / "whole")
    inner = task.model if adapter is None else task.model.get_base_model()
    # On one device nothing would be dispatched of itself.
    dispatch_model(inner, places, main_device="cpu", force_hooks=True)
    assert isinstance(inner.model.layers[1]._hf_hook, AlignDevicesHook)
    spread = collect(task, CollectConfig(), tmp_path / "spread")
    torch.testing.assert_close(spread.gram, whole.gram, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(spread.mean_gradient, whole.mean_gradient, rtol=1e-9, atol=1e-14)


def test_a_device_map_reaches_the_loader():
    values = config().model_dump()
    values["run"]["device_map"] = {"": "cpu"}
    task = load_task(Config.model_validate(values), device=CPU)
    assert next(task.model.parameters()).device == CPU


@pytest.mark.parametrize("other", ["disk", "cuda:0"])
def test_offloading_is_refused(other):
    places = {"model": "cpu", "lm_head": other}
    with pytest.raises(ConfigError, match="offloaded"):
        load_model(ModelConfig(path=str(FIXTURES / "tiny-aligned")), CPU, device_map=places)


def test_an_adapter_for_another_model_is_refused(tmp_path):
    made = attach_adapter(model(), AdapterConfig(r=2), seed=0)
    made.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapter cannot be loaded"):
        load_task(config(adapter=str(tmp_path)), device=CPU)


def test_an_adapter_without_its_base_is_refused(tmp_path):
    attach_adapter(model(), AdapterConfig(r=2), seed=0).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="adapter without its base model") as err:
        load_task(config(path=str(tmp_path)), device=CPU)
    assert "model.adapter" in err.value.fix


def test_task_carries_data_and_provenance():
    task = load_task(config(), device=CPU)
    assert task.control is not None
    assert task.safety.statistics["rows"] == len(task.safety.rows) == 160
    lengths = [row["tokens"] for row in task.safety.rows]
    assert min(lengths) > 0
    assert task.description["parameters_selected"] == task.description["parameters_total"] == 859_008
    first = next(iter(task.finetune.batches))
    assert first["input_ids"].shape[0] == 8


def test_duplicated_safety_rows_are_dropped_and_counted(tmp_path):
    line = (FIXTURES / "data" / "safety.jsonl").read_text().splitlines()
    (tmp_path / "d.jsonl").write_text("\n".join(line[:3] + line[:2]))
    values = config().model_dump()
    values["safety"]["path"] = str(tmp_path / "d.jsonl")
    task = load_task(Config.model_validate(values), device=CPU)
    assert task.safety.statistics["rows"] == 3
    assert task.safety.statistics["duplicates"] == 2


GOOD = """
import torch
from arisk import SampleSet, Task
def make():
    model = torch.nn.Linear(3, 1)
    loss = lambda m, b: m(b).square().sum(1)
    data = [torch.ones(4, 3)]
    return Task(model, SampleSet("safety", data, loss), SampleSet("finetune", data, loss), ["weight"])
def wrong(): return 3
def fails(): raise KeyError("gone")
"""


def test_python_entry(tmp_path, monkeypatch):
    (tmp_path / "my_task.py").write_text(GOOD)
    assert isinstance(task_from_entry(f"{tmp_path / 'my_task.py'}:make").model, nn.Linear)
    monkeypatch.chdir(tmp_path)
    assert task_from_entry("my_task:make").parameter_names == ["weight"]


@pytest.mark.parametrize(
    ("entry", "what"),
    [
        ("my_task.py:wrong", "returned int"),
        ("my_task.py:fails", "KeyError"),
        ("my_task.py:nothing", "no function"),
        ("other.py:make", "does not exist"),
        ("no_such_module:make", "cannot be imported"),
        ("bad.py:make", "cannot be imported"),
        ("nocolon", "module:function"),
    ],
)
def test_bad_python_entries(tmp_path, monkeypatch, entry, what):
    (tmp_path / "my_task.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text("def (")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=what):
        task_from_entry(entry)


@pytest.mark.parametrize("adapter", [None, {"r": 2}])
def test_layers_recompute_only_where_batches_train(adapter):
    task = load_task(config(gradient_checkpointing=True, dtype="float64", adapter=adapter), device=CPU)
    plain = load_task(config(dtype="float64", adapter=adapter), device=CPU)
    calls = []
    layer = next(m for m in task.model.modules() if type(m).__name__ == "LlamaMLP")
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    layout = layout_of(task.model, task.parameter_names)
    batch = task.finetune.batches[0]
    with measuring(task.model, layout), measuring(plain.model, layout):
        ours = mean_gradient(task.model, batch, task.finetune.loss_fn, layout)
        assert len(calls) == 2  # forward, and once more in the backward pass
        theirs = mean_gradient(plain.model, batch, plain.finetune.loss_fn, layout)
        choice = choose_engine(task.model, batch, task.finetune.loss_fn, layout, "auto")
        assert not any(module.training for module in task.model.modules())
    assert ours[0] == theirs[0]
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-12, atol=1e-14)
    assert choice.engine == "hooks"


def test_recomputing_refuses_dropout():
    net = model()
    net.config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="attention_dropout"):
        mark_recomputed(net)
