import pytest
import torch
from torch import nn

from arisk.base.errors import ConfigError, NumericsError
from arisk.gradients import choose_hvp, hvp, layout_of, mean_gradient, measuring
from tests.gradients import cases


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


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()


def classify(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def points(count=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator).to(dtype)
    return x, torch.randint(3, (count,), generator=generator)


def test_gauss_newton_against_the_dense_matrix():
    model, batch = net(), points()
    layout = layout_of(model, [name for name, _ in model.named_parameters()])
    vector = torch.randn(layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    dense = torch.zeros(layout.numel, layout.numel, dtype=torch.float64)
    probabilities = model(batch[0]).softmax(1).detach()
    for row, p in zip(model(batch[0]), probabilities, strict=True):
        jacobian = torch.stack(
            [
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(z, model.parameters(), retain_graph=True)]
                )
                for z in row
            ]
        )
        dense += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(batch[0])
    with measuring(model, layout):
        plan = choose_hvp(model, [batch], classify, layout, vector, "ggn")
        found = hvp(model, [batch, batch], classify, layout, vector, method="ggn", step=plan.step)
    assert plan.method == "ggn"
    assert float((found - dense @ vector).norm() / (dense @ vector).norm()) < 1e-5
    assert plan.error < 1e-3
    assert float(vector @ found) > 0


def test_gauss_newton_of_a_language_model_is_not_negative():
    model, batch, loss_fn, names, _ = cases.case("llama")
    layout = layout_of(model, names)
    with measuring(model, layout):
        for seed in range(3):
            v = torch.randn(layout.numel, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            assert float(v @ hvp(model, [batch], loss_fn, layout, v, method="ggn")) >= 0


def test_gauss_newton_of_logits_that_the_selection_does_not_reach_is_zero():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3).double(), nn.Parameter(torch.ones(4).double())

        def forward(self, x):
            return self.used(x)

    model, batch = Apart(), points()
    layout = layout_of(model, ["unused"])
    v = torch.ones(4, dtype=torch.float64)
    with measuring(model, layout):
        assert not hvp(model, [batch], classify, layout, v, method="ggn").any()


def test_gauss_newton_needs_logits():
    model, batch = net(), points()
    layout = layout_of(model, ["0.weight"])

    def twice(m, b):
        return classify(m, b) + classify(m, b)

    v = torch.ones(layout.numel, dtype=torch.float64)
    with measuring(model, layout), pytest.raises(ConfigError, match="logits"):
        choose_hvp(model, [batch], twice, layout, v, "ggn")


@pytest.mark.parametrize("method", ["finite_difference", "ggn"])
def test_a_narrow_model_is_differenced_in_float32(method):
    narrow, wide = net().to(torch.bfloat16), net().to(torch.bfloat16).float()
    narrow.register_buffer("scale", torch.ones(2, dtype=torch.bfloat16))
    before = {name: t.clone() for name, t in narrow.state_dict().items()}
    layout = layout_of(narrow, [name for name, _ in narrow.named_parameters()])
    v = torch.randn(layout.numel, generator=torch.Generator().manual_seed(0))
    with measuring(narrow, layout):
        ours = hvp(narrow, [points(dtype=torch.bfloat16)], classify, layout, v, method=method)
    with measuring(wide, layout):
        batch = points(dtype=torch.bfloat16)
        theirs = hvp(wide, [(batch[0].float(), batch[1])], classify, layout, v, method=method)
    # The step alone differs: the norm of the parameters is taken in another dtype.
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    after = narrow.state_dict()
    assert all(after[n].dtype == torch.bfloat16 and torch.equal(after[n], t) for n, t in before.items())


def test_a_narrow_model_is_back_after_an_error():
    model = net().to(torch.bfloat16)
    layout = layout_of(model, ["0.weight"])

    def broken(m, b):
        raise ValueError("no")

    with measuring(model, layout), pytest.raises(ValueError, match="no"):
        hvp(model, [points()], broken, layout, torch.ones(layout.numel), method="finite_difference")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
