"""Every term against explicit P × P matrices in float64, values and gradients."""

import pytest
import torch

from arisk.base.task import SampleSet
from arisk.guard import AlignGuardConfig, build_mitigator
from tests.guard.cases import (
    EXACT,
    SITES,
    delta_w,
    fisher,
    loss,
    mitigator,
    net,
    oracle,
    perturb,
    row_mass,
    samples,
)

SETTINGS = [
    {},
    {"split": "blocks"},
    {"split": "blocks", "lambda_a": 2.0, "lambda_t": 0.1, "lambda_nc": 3.0, "alpha": 0.2, "beta": 1.0},
]


def trained(model):
    return [p for layer in (model.first, model.second) for p in (layer.a, layer.b)]


@pytest.mark.parametrize("start", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["subspace", "blocks", "weights"])
def test_terms_are_those_of_dense_matrices(settings, start):
    model = net(start)
    f = fisher(model, samples())
    guard = mitigator(model, **settings)
    reference = delta_w(model).detach()
    perturb(model)
    found = guard.penalty().named()
    wanted = oracle(f, delta_w(model) - reference, config=guard.config)
    for name, value in wanted.items():
        assert torch.allclose(found[name], value, rtol=1e-8, atol=1e-14), name
        if name == "geodesic" and not settings:
            continue
        ours = torch.autograd.grad(found[name], trained(model), retain_graph=True)
        theirs = torch.autograd.grad(value, trained(model), retain_graph=True)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-12), name
    assert torch.allclose(guard.regularized_loss(torch.tensor(2.0)).total_loss, 2 + sum(wanted.values()))


def test_the_geodesic_term_is_degenerate_for_the_projector_alone():
    for split in ("subspace", "blocks"):
        model = net()
        guard = mitigator(model, split=split)
        perturb(model)
        value = float(guard.penalty().geodesic.detach())
        assert (abs(value) < 1e-12) if split == "subspace" else (value > 1e-4)


def test_fisher_diagonal_metric_is_the_rank_one_fit_of_mean_one():
    model, finetune = net(), samples(seed=9, batches=2)
    masses = row_mass(fisher(model, finetune))
    h = torch.cat([(m.sum(1, keepdim=True) * m.sum(0) / m.sum()).flatten() for m in masses])
    guard = mitigator(model, task_metric="fisher_diagonal", finetune=finetune)
    f = fisher(model, samples())
    reference = delta_w(model).detach()
    perturb(model)
    wanted = oracle(f, delta_w(model) - reference, config=guard.config, h=h / h.mean())
    assert torch.allclose(guard.penalty().task, wanted["task"], rtol=1e-8)


def test_a_custom_metric_gets_the_factors():
    model = net()
    guard = mitigator(model, task_metric=lambda name, drift: 3 * drift.squared_norm())
    plain = mitigator(model)
    perturb(model)
    assert torch.allclose(guard.penalty().task, 3 * plain.penalty().task)


def test_a_narrow_core_still_gives_a_projector_and_says_what_it_lost():
    model = net(True)
    exact, narrow = mitigator(model).directions, mitigator(model, width=2).directions
    assert exact.captured == pytest.approx(1, abs=1e-12)
    assert 0.3 < narrow.captured < 1
    assert narrow.explained <= narrow.captured
    eye = torch.eye(len(narrow.basis), dtype=torch.float64)
    assert torch.allclose(narrow.basis @ narrow.basis.T, eye, atol=1e-12)
    # The retained quadratic form is that of the compressed Fisher matrix Π F Π.
    blocks = [torch.kron(u, v) for u, v in narrow.frames]
    pi = torch.block_diag(*[b @ b.T for b in blocks])
    values = torch.linalg.eigvalsh(pi @ fisher(model, samples()) @ pi).flip(0)[: EXACT["rank"]]
    assert torch.allclose(values, narrow.eigenvalues, rtol=1e-9)


def test_drift_far_below_the_adapter_keeps_its_digits():
    model = net(True).float()
    data = [(x.float(), y) for x, y in samples().batches]
    guard = build_mitigator(model, SampleSet("safety", data, loss), AlignGuardConfig(**EXACT), sites=SITES)
    reference = delta_w(model.double()).detach()
    model.float()
    perturb(model, 1e-5)
    change = delta_w(model.double()) - reference
    model.float()
    f = fisher(net(True).double(), samples())
    wanted = oracle(f, change, config=guard.config)
    assert float(guard.penalty().task.detach()) == pytest.approx(float(wanted["task"].detach()), rel=1e-3)
    assert float(guard.penalty().geodesic.detach()) < 1e-6
