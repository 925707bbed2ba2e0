import pytest
import torch
from torch import nn

from arisk.base.errors import ConfigError, NumericsError
from arisk.gradients import (
    ENGINES,
    batch_invariance,
    choose_engine,
    layout_of,
    measuring,
    per_sample_gradients,
)
from tests.gradients import cases


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_engine_agrees_with_the_dense_oracle(name, engine):
    model, batch, loss_fn, names, oracle = cases.case(name)
    layout = layout_of(model, names)
    found, losses = cases.gradients(model, batch, loss_fn, layout, engine)
    torch.testing.assert_close(found, oracle, rtol=1e-9, atol=1e-11)
    if name != "mlp_mean_loss":
        torch.testing.assert_close(losses, loss_fn(model, batch).detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["tiny", "llama", "gpt2", "lora"])
def test_hooks_in_float32(name):
    model, batch, loss_fn, names, oracle = cases.case(name)
    with cases.in_float32(model):
        found, _ = cases.gradients(model, batch, loss_fn, layout_of(model, names), "hooks")
    error = (found.double() - oracle).norm(dim=1) / oracle.norm(dim=1)
    assert float(error.max()) < 1e-5


@pytest.mark.parametrize("name", cases.CASES)
def test_the_model_is_left_as_found(name):
    model, batch, loss_fn, names, _ = cases.case(name)
    layout = layout_of(model, names)
    model.train()
    first = next(model.parameters())
    first.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    grad = torch.ones_like(first)
    first.grad = grad
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    for engine in ("hooks", "loop"):
        cases.gradients(model, batch, loss_fn, layout, engine)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert first.grad is grad
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())
    first.grad = None
    first.requires_grad_(True)


def test_left_as_found_after_an_error():
    model, batch, _, names, _ = cases.case("tiny")
    model.train()

    def failing(m, b):
        m(b["ids"])
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cases.gradients(model, batch, failing, layout_of(model, names), "hooks")
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", cases.CASES)
def test_auto_takes_hooks_where_they_agree(name):
    model, batch, loss_fn, names, _ = cases.case(name)
    layout = layout_of(model, names)
    with measuring(model, layout):
        choice = choose_engine(model, batch, loss_fn, layout, "auto")
        assert choice.engine == "hooks"
        assert choice.parity["hooks"] < 1e-8
    assert choice.coverage["gradient_norm"] == pytest.approx(1.0)
    assert 0 < choice.coverage["parameters"] <= 1


class Bare(nn.Module):
    """A parameter used outside any module's forward: hooks cannot see it."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(5, dtype=torch.float64))


def bare_loss(model, batch):
    return (batch @ model.theta) ** 2


def test_auto_falls_back_to_vmap_where_hooks_see_nothing():
    model, batch = Bare(), torch.randn(3, 5, dtype=torch.float64)
    layout = layout_of(model, ["theta"])
    with measuring(model, layout):
        choice = choose_engine(model, batch, bare_loss, layout, "auto")
    assert choice.engine == "vmap"
    assert "hooks" in choice.refused


class Shuffler(nn.Module):
    """Flattens tokens into dimension 0 before a linear layer, as some mixture models do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4).double()

    def forward(self, x):
        return self.linear(x.reshape(-1, 4)).view_as(x)


def test_a_layer_without_the_batch_in_front_is_refused_not_wrong():
    model, batch = Shuffler(), torch.randn(3, 2, 4, dtype=torch.float64)
    layout = layout_of(model, ["linear.weight", "linear.bias"])

    def loss(m, b):
        return m(b).square().flatten(1).sum(1)

    with measuring(model, layout):
        assert choose_engine(model, batch, loss, layout, "auto").engine == "vmap"
        with pytest.raises(ConfigError, match="hooks"):
            choose_engine(model, batch, loss, layout, "hooks")


def test_a_loss_that_couples_samples_is_caught():
    model, batch, _, names, _ = cases.case("mlp")
    layout = layout_of(model, names)

    def coupled(m, b):
        out = m(b[0])
        return (out - out.mean(0)).square().sum(1) + out.sum(1)

    with measuring(model, layout):
        choice = choose_engine(model, batch, coupled, layout, "auto")
        assert choice.engine == "vmap"
        assert batch_invariance(model, batch, coupled, layout, "hooks") < 0.999


def test_padding_does_not_change_a_sample():
    model, batch, loss_fn, names, _ = cases.case("llama")
    layout = layout_of(model, names)
    with measuring(model, layout):
        assert batch_invariance(model, batch, loss_fn, layout, "hooks") > 1 - 1e-9


def test_a_part_of_the_selection_while_the_rest_stays_live():
    """Collecting group by group: parameters outside the group still require a gradient."""
    model, batch, loss_fn, names, oracle = cases.case("lora")
    full = layout_of(model, names)
    part = layout_of(model, [n for n in names if "layers.1" in n])
    blocks = {}
    with measuring(model, full):
        per_sample_gradients(
            model, batch, loss_fn, part, lambda n, b: blocks.setdefault(n, b.flatten(1)), engine="hooks"
        )
    for name in part.names:
        # transformers normalises in float32 inside a float64 model.
        torch.testing.assert_close(blocks[name], oracle[:, full.slice_of(name)], rtol=1e-5, atol=1e-8)


def test_frozen_parameters_before_the_selection_are_left_out():
    model, batch, loss_fn, names, oracle = cases.case("llama")
    kept = [n for n in names if "layers.1.mlp" in n]
    layout, full = layout_of(model, kept), layout_of(model, names)
    found, _ = cases.gradients(model, batch, loss_fn, layout, "hooks")
    expected = torch.cat([oracle[:, full.slice_of(n)] for n in kept], 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("engine", ENGINES)
def test_nan_names_the_sample(engine):
    model, batch, loss_fn, names, _ = cases.case("mlp")
    bad = (batch[0].clone(), batch[1])
    bad[0][2, 0] = float("nan")
    layout = layout_of(model, names)
    with measuring(model, layout), pytest.raises(NumericsError, match="sample 12"):
        per_sample_gradients(model, bad, loss_fn, layout, lambda n, b: None, engine=engine, offset=10)


def test_duplicated_and_permuted_samples():
    model, batch, loss_fn, names, oracle = cases.case("llama")
    order = torch.tensor([3, 0, 0, 2])
    moved = {k: v[order] for k, v in batch.items()}
    found, _ = cases.gradients(model, moved, loss_fn, layout_of(model, names), "hooks")
    torch.testing.assert_close(found, oracle[order], rtol=1e-9, atol=1e-11)
