import importlib.util
from pathlib import Path

import pytest
import torch

from arisk.errors import ConfigError, NumericsError
from arisk.gradients import choose_hvp, hvp, layout_of, mean_gradient, measuring

spec = importlib.util.spec_from_file_location("gradient_cases", Path(__file__).parent / "cases.py")
cases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cases)


def dense_hessian(model, batch, loss_fn, layout):
    """Column by column from the gradient of every gradient entry."""
    parameters = [dict(model.named_parameters())[n] for n in layout.names]
    grads = torch.autograd.grad(loss_fn(model, batch).mean(), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    return torch.stack(
        [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(e, parameters, retain_graph=True)])
            for e in flat
        ]
    )


@pytest.mark.parametrize(("method", "tolerance"), [("autograd", 1e-9), ("finite_difference", 1e-4)])
def test_products_against_the_dense_hessian(method, tolerance):
    model, batch, loss_fn, names, _ = cases.case("mlp")
    layout = layout_of(model, names)
    vector = torch.randn(layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in model.parameters()]
    with measuring(model, layout):
        dense = dense_hessian(model, batch, loss_fn, layout) @ vector
        found = hvp(model, [batch, batch], loss_fn, layout, vector, method=method)
    assert float((found - dense).norm() / dense.norm()) < tolerance
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_linear_in_the_vector_and_zero_for_zero():
    model, batch, loss_fn, names, _ = cases.case("mlp")
    layout = layout_of(model, names)
    v = torch.randn(layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with measuring(model, layout):
        one = hvp(model, [batch], loss_fn, layout, v, method="autograd")
        three = hvp(model, [batch], loss_fn, layout, 3 * v, method="autograd")
        none = hvp(model, [batch], loss_fn, layout, 0 * v, method="finite_difference")
    torch.testing.assert_close(three, 3 * one)
    assert not none.any()


@pytest.mark.parametrize("name", ["mlp", "llama", "lora"])
def test_choice_measures_its_error(name):
    model, batch, loss_fn, names, _ = cases.case(name)
    layout = layout_of(model, names)
    v = torch.randn(layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with measuring(model, layout):
        plan = choose_hvp(model, [batch], loss_fn, layout, v, "auto")
        differences = choose_hvp(model, [batch], loss_fn, layout, v, "finite_difference")
        exact = hvp(model, [batch], loss_fn, layout, v, method="autograd")
        rough = hvp(model, [batch], loss_fn, layout, v, method="finite_difference", step=differences.step)
    assert plan.method == "autograd"
    assert plan.error < 1e-2
    true_error = float((rough - exact).norm() / exact.norm())
    assert true_error < 10 * differences.error + 1e-6


class NoSecond(torch.autograd.Function):
    """A square whose backward cannot be differentiated, like fused attention kernels."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def test_falls_back_to_differences_without_double_backward():
    model = torch.nn.Linear(3, 1, bias=False).double()
    batch = torch.randn(4, 3, dtype=torch.float64)
    layout = layout_of(model, ["weight"])

    def loss(m, b):
        return NoSecond.apply(m(b)).sum(1)

    v = torch.ones(3, dtype=torch.float64)
    with measuring(model, layout):
        plan = choose_hvp(model, [batch], loss, layout, v, "auto")
        assert plan.method == "finite_difference"
        found = hvp(model, [batch], loss, layout, v, method=plan.method, step=plan.step)
        with pytest.raises(ConfigError, match="double backward"):
            choose_hvp(model, [batch], loss, layout, v, "autograd")
    torch.testing.assert_close(found, 2 * batch.T @ batch @ v / 4, rtol=1e-6, atol=1e-9)


def test_mean_gradient_is_the_mean_of_the_samples():
    model, batch, loss_fn, names, oracle = cases.case("llama")
    layout = layout_of(model, names)
    with measuring(model, layout):
        loss, gradient = mean_gradient(model, batch, loss_fn, layout)
    torch.testing.assert_close(gradient, oracle.mean(0), rtol=1e-9, atol=1e-12)
    assert loss == pytest.approx(float(loss_fn(model, batch).mean().detach()))


def test_mean_gradient_refuses_nan():
    model, batch, loss_fn, names, _ = cases.case("mlp")
    layout = layout_of(model, names)
    with measuring(model, layout), pytest.raises(NumericsError, match="nan"):
        mean_gradient(model, (batch[0] * float("nan"), batch[1]), loss_fn, layout)
