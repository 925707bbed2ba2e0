"""The table of optimizers: steps, states and scales against torch and closed forms."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from arisk.anatomy.update import preconditioner
from arisk.base.errors import ConfigError
from arisk.base.task import SampleSet, Task
from arisk.config import names
from arisk.config.plan import RolloutConfig, TrainingConfig
from arisk.forecast.rollout import rollout
from arisk.gradients import layout_of
from arisk.training.optimizers import OPTIMIZERS, Ageing, Lion, optimizer_named
from arisk.training.recipe import decaying_names, parameter_groups, recipe_of, require_recipe

KINDS = ["adamw", "sgd", "adafactor", "lion", "muon", "rmsprop"]
SETTINGS = {"sgd": {"momentum": 0.9}, "rmsprop": {"momentum": 0.5}}


def settings_of(kind):
    return TrainingConfig(optimizer=kind, **SETTINGS.get(kind, {}))


class Net(nn.Module):
    """A matrix, and a vector beside it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, 4).double()

    def forward(self, x):
        return self.inner(x)


def built(kind, model):
    training = settings_of(kind)
    names, parameters = zip(*model.named_parameters(), strict=True)
    groups = parameter_groups(model, names, parameters, training)
    parts = optimizer_named(kind).build(groups, training)
    of = {id(p): (s, g) for s in parts for g in s.optimizer.param_groups for p in g["params"]}
    return parts, [(p, *of[id(p)]) for p in parameters]


def steps(parts, members, gradients, count, rate):
    for _ in range(count):
        for part in parts:
            for group in part.optimizer.param_groups:
                group["lr"] = rate
        for (parameter, _, _), gradient in zip(members, gradients, strict=True):
            parameter.grad = gradient.clone()
        for part in parts:
            part.optimizer.step()


def test_the_kinds_tested_are_all_there_are():
    assert set(OPTIMIZERS) == set(names.OPTIMIZERS)
    assert {kind.name for kind in OPTIMIZERS.values() if kind.note is None} >= set(KINDS)
    builders = {kind.build for kind in OPTIMIZERS.values()}
    assert builders == {OPTIMIZERS[name].build for name in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_ages_as_under_that_gradient(kind):
    """Seven steps more of one and the same gradient, made or told: the same state."""
    pytest.importorskip("transformers")
    model = Net()
    parts, members = built(kind, model)
    first, then = ([torch.randn_like(p) for p, _, _ in members] for _ in range(2))
    steps(parts, members, first, 3, 0.0)
    before = [copy.deepcopy(dict(part.optimizer.state[p])) for p, part, _ in members]
    steps(parts, members, then, 7, 0.0)
    for (parameter, part, group), state, gradient in zip(members, before, then, strict=True):
        part.kind.age(state, group, Ageing(gradient, gradient.square(), 7, 1.0))
        for key, value in part.optimizer.state[parameter].items():
            if key == "RMS":
                continue
            if key == "momentum_buffer" and kind == "rmsprop":
                # Its buffer holds steps, whose scale moved on the way.
                torch.testing.assert_close(state[key], value, rtol=0.2, atol=0.1)
                continue
            assert torch.allclose(torch.as_tensor(state[key]), torch.as_tensor(value), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor", "rmsprop", "lion"])
def test_a_scale_is_the_step_of_a_steady_gradient(kind):
    """After many steps of one gradient a step is D g times the gain."""
    model = Net()
    parts, members = built(kind, model)
    gradients = [torch.randn_like(p) for p, _, _ in members]
    steps(parts, members, gradients, 4000 if kind == "rmsprop" else 300, 0.0)
    before = [p.detach().clone() for p, _, _ in members]
    steps(parts, members, gradients, 1, 1e-6)
    for (parameter, part, group), start, gradient in zip(members, before, gradients, strict=True):
        scale = part.kind.scale(part.optimizer.state[parameter], group, gradient.square())
        moved = (start - parameter.detach()) / 1e-6
        torch.testing.assert_close(moved, scale * gradient * part.kind.gain(group), rtol=1e-4, atol=1e-5)


def test_lion_is_its_algorithm():
    weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    optimizer = Lion([weight], lr=0.1, betas=(0.9, 0.99), weight_decay=0.2)
    value, momentum = weight.detach().clone(), torch.zeros(3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        gradient = torch.randn(3, dtype=torch.float64, generator=generator)
        weight.grad = gradient.clone()
        optimizer.step()
        value = value - 0.1 * ((0.9 * momentum + 0.1 * gradient).sign() + 0.2 * value)
        momentum = 0.99 * momentum + 0.01 * gradient
    assert weight.detach().tolist() == pytest.approx(value.tolist(), rel=1e-12)


def test_muon_moves_matrices_and_adamw_the_rest():
    """A matrix' update has singular values of equal size and a root mean square of .2."""
    model = Net()
    parts, members = built("muon", model)
    assert [part.kind.name for part in parts] == ["muon", "adamw"]
    start = [p.detach().clone() for p, _, _ in members]
    gradients = [torch.randn_like(p) for p, _, _ in members]
    steps(parts, members, gradients, 1, 1.0)
    update = start[0] - members[0][0].detach()
    singular = torch.linalg.svdvals(update)
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.25)
    assert float(singular.max() / singular.min()) < 2
    assert (start[1] - members[1][0].detach()).tolist() == pytest.approx(
        gradients[1].sign().tolist(), rel=1e-6
    )


@pytest.mark.parametrize("kind", ["adafactor", "lion", "muon", "rmsprop"])
def test_a_rollout_leaps_with_any_of_them(kind):
    """A leaping run ends where the real one does; where it does not move, half of that is the error."""
    pytest.importorskip("transformers")
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 4, dtype=torch.float64, generator=generator)

    def data(count):
        points = torch.randn(count, 8, 6, dtype=torch.float64, generator=generator)
        return [(x, (x @ teacher).argmax(1)) for x in points]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    safety, batches = data(3), data(60)
    changes = []
    for pilot in (300, None):
        task = Task(
            Net(),
            SampleSet("safety", safety, loss),
            SampleSet("finetune", batches, loss),
            ["inner.weight", "inner.bias"],
        )
        training = TrainingConfig(optimizer=kind, learning_rate=2e-3, **SETTINGS.get(kind, {}))
        found = rollout(task, config=RolloutConfig(pilot_steps=pilot), training=training, steps=300)
        changes.append(float(found.safety[:, -1].mean()))
    assert found.gradient_evaluations < 150
    assert abs(changes[0]) > 0.1
    assert changes[1] == pytest.approx(changes[0], rel=0.15)


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "momentum": 0.9},
        {"optimizer": "sgd", "betas": (0.8, 0.9)},
        {"optimizer": "sgd", "optimizer_args": {"alpha": 1.0}},
    ],
)
def test_what_is_not_known_is_an_error(settings):
    with pytest.raises(ConfigError) as caught:
        recipe_of(TrainingConfig(**settings), 10)
    assert caught.value.where.startswith("training.")


def test_an_unknown_name_is_an_error_in_the_local_model_too():
    model = Net()
    layout = layout_of(model, ["inner.weight"])
    with pytest.raises(ConfigError):
        optimizer_named("adams")
    with pytest.raises(ConfigError):
        preconditioner(
            model, layout, torch.ones(24), torch.zeros(24), TrainingConfig.model_construct(optimizer="adams")
        )


def test_kinds_that_save_memory_say_what_they_are():
    for name, parent in (("adamw_bnb_8bit", "adamw"), ("paged_adamw_32bit", "adamw"), ("lion_8bit", "lion")):
        (note,) = recipe_of(TrainingConfig(optimizer=name), 5).notes
        assert name in note
        assert f"as {parent} in full precision" in note
    assert recipe_of(TrainingConfig(optimizer="adamw_torch_fused"), 5).notes == ()


def test_a_further_optimizer_is_one_entry(monkeypatch):
    """A signed step under its own name: it trains, leaps and preconditions."""
    toy = dataclasses.replace(OPTIMIZERS["lion"], name="signs", age=None)
    monkeypatch.setitem(OPTIMIZERS, "signs", toy)
    recipe = recipe_of(TrainingConfig(optimizer="signs"), 5)
    assert recipe.kind is toy
    assert "leaps leave it alone" in recipe.notes[0]


def test_decay_is_the_trainers():
    transformers = pytest.importorskip("transformers")
    from transformers.trainer_pt_utils import get_parameter_names

    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    assert decaying_names(gpt2) == set(get_parameter_names(gpt2, [nn.LayerNorm], patterns))
    assert decaying_names(Net()) == {"inner.weight"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_may_be_planned(name):
    notes = require_recipe(TrainingConfig(optimizer=name, weight_decay=0.1))
    kept = any(part in name for part in ("8bit", "4bit", "galore", "paged"))
    assert any("full precision" in note or "GaLore" in note for note in notes) == kept


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "sgd", "optimizer_args": {"nesterov": True}}, "Nesterov"),
        ({"optimizer": "sgd", "momentum": 0.9, "optimizer_args": {"dampening": "much"}}, "str"),
        ({"optimizer": "rmsprop", "optimizer_args": {"alpha": -1}}, "Invalid alpha value: -1"),
        ({"optimizer": "muon", "optimizer_args": {"momentum": "much"}}, "str"),
        ({"optimizer": "lion", "optimizer_args": {"rho": 1}}, "no setting 'rho'"),
        ({"optimizer": "sgd", "eps": 1e-3}, "none of the settings of sgd"),
        ({"schedule": "cosine_with_min_lr"}, "needs `min_lr` or `min_lr_rate`"),
        ({"schedule": "linear", "schedule_args": {"power": 2}}, "no argument 'power'"),
    ],
)
def test_a_recipe_that_cannot_be_built_is_an_error_of_the_config(settings, said):
    with pytest.raises(ConfigError, match=said) as caught:
        require_recipe(TrainingConfig(**settings))
    assert caught.value.where.startswith("training.")
