"""The mitigator as an object: where gradient goes, what it leaves alone, its state and its errors."""

import pytest
import torch
from torch import nn

from arisk.base.errors import ArtifactError, ConfigError, InputError, NumericsError
from arisk.base.task import SampleSet
from arisk.guard import AlignGuardConfig, LoRAMitigator, Site, build_mitigator, weight_sites
from tests.guard.cases import SITES, fisher, loss, mitigator, net, perturb, samples


def test_everything_is_zero_at_the_reference():
    model = net(True)
    guard = mitigator(model, split="blocks")
    perturb(model)
    assert all(float(value.detach()) > 0 for value in guard.penalty().named().values())
    guard.reset_reference()
    assert all(float(value.detach()) == 0 for value in guard.penalty().named().values())
    assert guard.gradient_norms() == {"fisher": 0, "task": 0, "overlap": 0, "geodesic": 0}


def test_gradient_with_b_zero_reaches_b_and_after_one_step_a():
    model = net()
    guard = mitigator(model)
    with torch.no_grad():
        model.first.b += 0.1
        guard.reset_reference()
        model.first.b -= 0.1
    # Against another reference: ∂/∂A = s Bᵀ ∂/∂ΔW is exactly 0 where B = 0, ∂/∂B is not.
    guard.regularized_loss(torch.tensor(0.0)).total_loss.backward()
    assert float(model.first.b.grad.norm()) > 0
    assert float(model.first.a.grad.norm()) == 0
    model.zero_grad()
    with torch.no_grad():
        model.first.b -= 0.01
    guard.penalty().fisher.backward()
    assert float(model.first.a.grad.norm()) > 0
    assert float(model.first.b.grad.norm()) > 0


def test_gradient_norms_are_those_of_backward_and_leave_grad_alone():
    model = net()
    guard = mitigator(model, split="blocks")
    perturb(model)
    norms = guard.gradient_norms()
    assert all(p.grad is None for p in model.parameters())
    guard.penalty().overlap.backward()
    total = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert norms["overlap"] == pytest.approx(total**0.5)


def test_no_random_numbers_are_used_and_the_model_is_left_as_found():
    model = net(True).train()
    model.first.a.grad = torch.ones_like(model.first.a)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    guard = mitigator(model, width=2)
    guard.penalty().total.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training
    assert not model.first.base._forward_hooks
    assert torch.equal(model.first.a.grad, torch.ones_like(model.first.a))


def test_the_same_seed_gives_the_same_directions():
    first, second = mitigator(net(), width=2).directions, mitigator(net(), width=2).directions
    assert torch.equal(first.basis, second.basis)


@pytest.mark.parametrize("settings", [{}, {"split": "blocks", "task_metric": "fisher_diagonal"}])
def test_a_saved_mitigator_gives_the_same_penalty(tmp_path, settings):
    model = net(True)
    guard = mitigator(model, finetune=samples(seed=9), **settings)
    perturb(model)
    guard.save(tmp_path / "guard")
    again = LoRAMitigator.load(tmp_path / "guard", model)
    assert again.config == guard.config
    for name, value in guard.penalty().named().items():
        assert torch.equal(value, again.penalty().named()[name]), name
    assert sorted(path.name for path in (tmp_path / "guard").iterdir()) == [
        "record.json",
        "tensors.safetensors",
    ]


def test_a_custom_metric_must_be_given_again(tmp_path):
    guard = mitigator(net(), task_metric=lambda name, drift: drift.squared_norm())
    guard.save(tmp_path)
    with pytest.raises(ConfigError, match="custom task metric"):
        LoRAMitigator.load(tmp_path, net())
    assert LoRAMitigator.load(tmp_path, net(), task_metric=lambda n, d: d.squared_norm()).status == "ready"


def test_damage_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="saved mitigator"):
        LoRAMitigator.load(tmp_path, net())
    mitigator(net()).save(tmp_path)
    (tmp_path / "record.json").write_text('{"format_version": 1, "type": "LoRAMitigator"}')
    with pytest.raises(ArtifactError, match="saved mitigator"):
        LoRAMitigator.load(tmp_path, net())


def test_a_term_that_is_not_finite_is_named():
    model = net()
    guard = mitigator(model)
    with torch.no_grad():
        model.first.b[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="the fisher term"):
        guard.penalty()


def test_trained_weights_are_guarded_directly():
    model = net()
    for layer in (model.first, model.second):
        layer.base.requires_grad_(True)
    names = ["first.base.weight", "second.base.weight"]
    config = AlignGuardConfig(rank=3, width=64)
    guard = build_mitigator(model, samples(), config, sites=weight_sites([*names, "second.base.bias"]))
    f = fisher(net(), samples())
    with torch.no_grad():
        model.first.base.weight += 0.1
    penalty = guard.penalty()
    # The bias has a share in the directions and has not moved; ‖ΔW‖² = ‖PΔW‖² + ‖ΔW_T‖² all the same.
    split = guard.penalty().task / config.lambda_t
    assert 0 < float(split.detach()) <= 20 * 0.01 + 1e-12
    penalty.total.backward()
    assert float(model.first.base.weight.grad.norm()) > 0

    guard = build_mitigator(net(), samples(), config, sites=weight_sites(names))
    values = torch.linalg.eigvalsh(f).flip(0)[:3]
    assert torch.allclose(guard.directions.eigenvalues, values, rtol=1e-9)


def test_a_skipped_mitigator_adds_nothing_and_says_why():
    guard = build_mitigator(net(), samples(), require_lora_match=False)
    assert guard.status == "skipped"
    assert "no trainable LoRA pair" in guard.reason
    task = torch.tensor(3.0)
    assert float(guard.regularized_loss(task).total_loss) == 3
    assert set(guard.gradient_norms().values()) == {0.0}
    with pytest.raises(ConfigError, match="no trainable LoRA pair"):
        build_mitigator(net(), samples())


def test_what_cannot_be_guarded_is_refused():
    model = net()
    with pytest.raises(ConfigError, match="no parameter 'x'"):
        build_mitigator(model, samples(), sites=[Site("x")])
    with pytest.raises(ConfigError, match="two active adapters"):
        build_mitigator(model, samples(), sites=[SITES[0], SITES[0]])
    with pytest.raises(InputError, match="adapter"):
        build_mitigator(model, samples(), sites=[Site("first.base.weight", "second.a", "second.b")])
    with pytest.raises(ConfigError, match="needs fine-tuning data"):
        mitigator(model, task_metric="fisher_diagonal")
    flat = SampleSet("safety", samples().batches, lambda m, b: 0 * loss(m, b))
    with pytest.raises(NumericsError, match="exactly zero"):
        build_mitigator(model, flat, sites=SITES)
    with pytest.raises(NumericsError, match="no samples"):
        build_mitigator(model, SampleSet("safety", [], loss), sites=SITES)
    with pytest.raises(ConfigError, match="greater than or equal to 0"):
        AlignGuardConfig(lambda_a=-1)
    tied = net()
    tied.again = nn.Linear(5, 4).double()
    tied.again.weight = tied.first.base.weight
    with pytest.raises(InputError, match="tied"):
        build_mitigator(tied, samples(), sites=SITES)
