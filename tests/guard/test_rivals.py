"""EWC, projection and the sampled overlap term against dense float64 oracles."""

import pytest
import torch

from arisk.base.errors import NumericsError
from arisk.gradients import layout_of, measuring
from arisk.guard import (
    AlignGuardConfig,
    LoRAMitigator,
    ewc_penalty,
    fisher_diagonals,
    leading_directions,
    outside,
    per_sample_rows,
    without_conflict,
)
from tests.guard.cases import loss, mitigator, net, perturb, samples

NAMES = ["first.a", "first.b", "second.a", "second.b"]


def dense_rows(model, data):
    """(N, P) per-sample gradients by a loop of autograd."""
    parameters = [dict(model.named_parameters())[name] for name in NAMES]
    rows = []
    for x, y in data.batches:
        for i in range(len(x)):
            grads = torch.autograd.grad(loss(model, (x[i : i + 1], y[i : i + 1])).mean(), parameters)
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def test_fisher_and_rows_are_those_of_a_loop():
    model, data = net(trained=True), samples()
    want = dense_rows(model, data)
    layout = layout_of(model, NAMES)
    with measuring(model, layout):
        rows = per_sample_rows(model, layout, data, chunk_size=3)
        diagonals = fisher_diagonals(model, layout, data, chunk_size=3)
    assert torch.allclose(rows, want, atol=1e-12)
    flat = torch.cat([d.flatten() for d in diagonals])
    assert torch.allclose(flat, want.square().mean(0), atol=1e-12)


def test_ewc_is_the_quadratic_form_with_its_gradient():
    model, data = net(trained=True), samples()
    f = dense_rows(model, data).square().mean(0)
    parameters = [dict(model.named_parameters())[name] for name in NAMES]
    reference = [p.detach().clone() for p in parameters]
    layout = layout_of(model, NAMES)
    with measuring(model, layout):
        diagonals = fisher_diagonals(model, layout, data)
    assert float(ewc_penalty(parameters, reference, diagonals).detach()) == 0
    perturb(model)
    change = torch.cat([(p - q).flatten() for p, q in zip(parameters, reference, strict=True)]).detach()
    value = ewc_penalty(parameters, reference, diagonals)
    assert float(value.detach()) == pytest.approx(float(change @ torch.diag(f) @ change))
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
    assert torch.allclose(gradient, 2 * f * change)


def test_a_fresh_adapters_a_has_fisher_zero():
    """What EWC in raw coordinates cannot guard, and the mitigator can."""
    model = net()
    layout = layout_of(model, NAMES)
    with measuring(model, layout):
        diagonals = dict(zip(NAMES, fisher_diagonals(model, layout, samples()), strict=True))
    assert not diagonals["first.a"].any()
    assert diagonals["first.b"].any()


def test_projection_takes_the_conflicting_part_alone():
    g, s = torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = s if float(g @ s) < 0 else -s
    parts = lambda v: [v[:3], v[3:].view(2, 2)]  # noqa: E731
    changed, cosine = without_conflict(parts(g), parts(s))
    flat = torch.cat([part.flatten() for part in changed])
    projector = torch.eye(7, dtype=torch.float64) - torch.outer(s, s) / (s @ s)
    assert torch.allclose(flat, projector @ g)
    assert float(flat @ s) == pytest.approx(0, abs=1e-12)
    assert cosine == pytest.approx(float(torch.cosine_similarity(g, s, dim=0)))
    kept, _ = without_conflict(parts(g), parts(-s))
    assert torch.equal(torch.cat([part.flatten() for part in kept]), g)
    zero, cosine = without_conflict(parts(g), parts(torch.zeros_like(s)))
    assert torch.equal(torch.cat([part.flatten() for part in zero]), g)
    assert cosine != cosine  # noqa: PLR0124 - NaN: not defined
    # What overflows in the task is not the projection's: the trainer's scaler or its next loss tells.
    over = torch.cat([torch.tensor([torch.inf], dtype=g.dtype), g[1:]])
    left, cosine = without_conflict(parts(over), parts(s))
    assert torch.equal(torch.cat([part.flatten() for part in left]), over)
    assert cosine != cosine  # noqa: PLR0124 - NaN: not defined
    with pytest.raises(NumericsError, match="projection"):
        without_conflict(parts(g), parts(over))


def test_leading_directions_are_those_of_the_fisher_matrix():
    rows = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows[5] = rows[4]  # rank 5
    found = leading_directions(rows, 3)
    assert torch.allclose(found @ found.T, torch.eye(3, dtype=torch.float64), atol=1e-10)
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    top = vectors[:, -3:]
    assert torch.allclose(found.T @ found, top @ top.T, atol=1e-8)
    assert len(leading_directions(rows, 9)) == 5
    g = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    changed, share = outside([g[:4], g[4:]], found)
    assert torch.allclose(torch.cat(changed), g - top @ (top.T @ g), atol=1e-8)
    assert share == pytest.approx(float((top.T @ g).norm() / g.norm()))


def test_the_sampled_overlap_term_is_unbiased_and_the_exact_one_is_the_default():
    model = net(trained=True)
    exact = mitigator(model, lambda_a=0, lambda_t=0, alpha=1.0)
    sampled = LoRAMitigator(model, exact.sites, exact.directions, few(exact.config, 2))
    whole = LoRAMitigator(model, exact.sites, exact.directions, few(exact.config, 99))
    perturb(model)
    want = float(exact.penalty().overlap.detach())
    values = [float(sampled.penalty(step).overlap.detach()) for step in range(400)]
    mean = sum(values) / len(values)
    spread = torch.tensor(values).std().item() / len(values) ** 0.5
    assert spread > 0
    assert abs(mean - want) < 4 * spread
    assert float(whole.penalty().overlap.detach()) == want
    assert float(sampled.penalty(3).overlap.detach()) == values[3]


def test_the_gradient_of_the_sampled_overlap_term_is_unbiased():
    model = net(trained=True)
    exact = mitigator(model, lambda_a=0, lambda_t=0, alpha=1.0)
    sampled = LoRAMitigator(model, exact.sites, exact.directions, few(exact.config, 1))
    perturb(model)
    parameter = model.first.b
    want = torch.autograd.grad(exact.penalty().overlap, parameter)[0]
    drawn = torch.stack(
        [torch.autograd.grad(sampled.penalty(step).overlap, parameter)[0] for step in range(400)]
    )
    error = drawn.std(0) / len(drawn) ** 0.5
    assert bool(((drawn.mean(0) - want).abs() <= 5 * error + 1e-12).all())


def few(config, rows):
    return AlignGuardConfig(**{**config.model_dump(), "overlap_rows": rows})
