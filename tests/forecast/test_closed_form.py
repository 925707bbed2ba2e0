"""The closed-form cases, run through the public Python API."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from arisk import AlignmentRiskPipeline, PipelineConfig

CASES = json.loads((Path(__file__).parents[2] / "fixtures" / "closed_form_cases.json").read_text())["cases"]


class Point(torch.nn.Module):
    """A model that is its parameter vector, with quadratic losses around the origin."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.theta = torch.nn.Parameter(torch.zeros(dimension, dtype=torch.float64))


def report_of(case, *, rotation=None, **overrides):
    rows = torch.tensor(case["safety_rows"], dtype=torch.float64)
    safety_h = torch.tensor(case["safety_hessian"], dtype=torch.float64)
    h = torch.tensor(case["finetune_hessian"], dtype=torch.float64)
    g = torch.tensor(case["finetune_gradient"], dtype=torch.float64)
    if rotation is not None:
        rows, g = rows @ rotation.T, rotation @ g
        safety_h, h = rotation @ safety_h @ rotation.T, rotation @ h @ rotation.T
    training = {("optimizer" if k == "name" else k): v for k, v in case["training"].items()}
    training.setdefault("max_grad_norm", None)
    config = PipelineConfig(
        training=training,
        forecast={"collapse_threshold": case["collapse_threshold"], "bootstrap_samples": 20},
    )

    def safety_loss(model, batch):
        return batch @ model.theta + 0.5 * model.theta @ safety_h @ model.theta

    def finetune_loss(model, batch):
        return batch.mean() + g @ model.theta + 0.5 * model.theta @ h @ model.theta

    return AlignmentRiskPipeline(config).run(
        model=Point(len(g)),
        safety_dataloader=[rows],
        safety_loss_fn=safety_loss,
        fine_tune_dataloader=[torch.zeros(2, 1, dtype=torch.float64)],
        fine_tune_loss_fn=finetune_loss,
    )


def close(found, truth):
    if truth is None:
        return found is None
    return found is not None and abs(found - truth) <= max(1, 0.02 * truth)


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_local_model_gives_the_true_collapse_step(case):
    report = report_of(case)
    local = report.forecast.forecasters["local"]
    assert close(local.collapse_step, case["true_collapse_step"])
    assert local.horizon == case["training"]["max_steps"]
    for step, change in case["true_safety_increase"].items():
        if int(step) in local.steps:
            found = local.median[local.steps.index(int(step))]
            assert found == pytest.approx(change, rel=1e-4, abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_the_verdict_says_so(case):
    report = report_of(case)
    assert report.verdict.basis == "combined"
    assert report.forecast.collapse_step == report.forecast.forecasters["combined"].collapse_step
    assert (report.verdict.level == "high") == (case["true_collapse_step"] is not None)


def exact_iterates(h, g, training, rates):
    point = torch.zeros_like(g).requires_grad_()
    if training["name"] == "adamw":
        optimizer = torch.optim.AdamW(
            [point], lr=1.0, betas=training["betas"], eps=training["eps"], weight_decay=0.0
        )
    else:
        optimizer = torch.optim.SGD([point], lr=1.0, momentum=training.get("momentum", 0.0))
    for rate in rates.tolist():
        optimizer.param_groups[0]["lr"] = rate
        point.grad = g + h @ point.detach()
        optimizer.step()
        yield point.detach().clone()


def random_case(seed):
    """A rotated problem with random curvature, recipe and threshold, and its true collapse step."""
    from arisk.training.schedules import learning_rates

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    rows = normal(6, 12) * torch.logspace(0, -1, 12, dtype=torch.float64)
    rows = torch.cat([rows, -rows]) @ torch.linalg.qr(normal(12, 12)).Q
    root = normal(12, 12) * 0.3
    h, g = root @ root.T, normal(12)
    training = {"name": "adamw" if seed % 2 else "sgd", "learning_rate": 0.003, "max_steps": 300}
    training |= {"betas": [0.9, 0.999], "eps": 1e-8} if seed % 2 else {"momentum": 0.9 if seed % 4 else 0.0}
    training |= {"schedule": ["constant", "linear", "cosine"][seed % 3], "warmup_steps": 20 * (seed % 2)}
    rates = learning_rates(0.003, 300, schedule=training["schedule"], warmup_steps=training["warmup_steps"])
    safety_h = rows.T @ rows / len(rows)
    changes = [float(0.5 * d @ safety_h @ d) for d in exact_iterates(h, g, training, rates)]
    threshold = 0.4 * max(changes) if seed % 5 else 1.5 * max(changes)
    truth = next((k for k, change in enumerate(changes, 1) if change >= threshold), None)
    return {
        "safety_rows": rows.tolist(),
        "safety_hessian": safety_h.tolist(),
        "finetune_hessian": h.tolist(),
        "finetune_gradient": g.tolist(),
        "training": training,
        "collapse_threshold": threshold,
        "true_collapse_step": truth,
    }


@pytest.mark.parametrize("seed", range(24))
def test_random_rotated_cases(seed):
    case = random_case(seed)
    assert close(report_of(case).forecast.forecasters["local"].collapse_step, case["true_collapse_step"])


@pytest.mark.parametrize("seed", range(4))
def test_rotating_the_parameters_changes_nothing_under_sgd(seed):
    case = random_case(2 * seed)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator)).Q
    plain, turned = report_of(case), report_of(case, rotation=rotation)
    a, b = plain.forecast.forecasters["local"], turned.forecast.forecasters["local"]
    assert a.collapse_step == b.collapse_step
    assert b.median == pytest.approx(a.median, rel=1e-6, abs=1e-12)
    assert turned.initial_risk.ratio == pytest.approx(plain.initial_risk.ratio, rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_raising_overlap_never_lowers_predicted_harm(seed):
    """Turning the update into the safety subspace, at equal length and without curvature."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator)).Q
    inside, outside = frame[0], frame[1]
    case = {
        "safety_rows": [inside.tolist(), (-inside).tolist()],
        "safety_hessian": torch.outer(inside, inside).tolist(),
        "finetune_hessian": torch.zeros(12, 12).tolist(),
        "training": {"name": "sgd", "learning_rate": 0.01, "max_steps": 120},
        "collapse_threshold": 0.1,
    }
    harm = []
    for angle in torch.linspace(0.05, math.pi / 2, 6).tolist():
        gradient = math.sin(angle) * inside + math.cos(angle) * outside
        report = report_of({**case, "finetune_gradient": gradient.tolist()})
        harm.append((report.initial_risk.ratio, report.forecast.forecasters["local"].median[-1]))
    assert harm == sorted(harm)
    assert harm[-1][0] == pytest.approx(1.0)
    assert harm[-1][1] == pytest.approx(0.5 * 1.2**2)


def test_bound_is_silent_where_the_gradient_lies_inside_and_the_verdict_is_not():
    case = next(c for c in CASES if c["name"] == "B1")
    report = report_of(case)
    bound = report.forecast.forecasters["bound"]
    assert bound.collapse_step is None
    assert bound.kind == "bound"
    assert report.verdict.level == "high"


def near(found, truth, share):
    """Within a share of the truth, or one step."""
    if truth is None:
        return found is None
    return found is not None and abs(found - truth) <= max(1, share * truth)


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_the_rollout_is_within_15_percent(case):
    measured = report_of(case).forecast.forecasters["rollout"]
    assert near(measured.collapse_step, case["true_collapse_step"], 0.15)


def bent_case(seed):
    """A rotated problem whose curvature has both signs, of random length, recipe and threshold."""
    from arisk.training.schedules import learning_rates

    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    rows = normal(6, 12) * torch.logspace(0, -1, 12, dtype=torch.float64)
    rows = torch.cat([rows, -rows]) @ torch.linalg.qr(normal(12, 12)).Q
    frame = torch.linalg.qr(normal(12, 12)).Q
    curvature = 3 * torch.rand(12, dtype=torch.float64, generator=generator) - 1.5
    h, g = frame @ torch.diag(curvature) @ frame.T, normal(12)
    flow, level, _ = torch.rand(3, dtype=torch.float64, generator=generator).tolist()
    steps, adaptive, heavy = [150, 300, 600][seed % 3], seed % 2 == 1, seed % 4 == 0
    rate = (0.6 + flow) * (0.8 if adaptive else 1.6) / steps / (10 if heavy else 1)
    recipe = {"betas": [0.9, 0.999], "eps": 1e-8} if adaptive else {"momentum": 0.9 if heavy else 0.0}
    schedule = {"schedule": ["constant", "linear", "cosine"][seed // 2 % 3]}
    schedule |= {"warmup_steps": steps // 15 if seed % 5 == 1 else 0}
    training = {"name": "adamw" if adaptive else "sgd", "learning_rate": rate, "max_steps": steps}
    training |= recipe | schedule
    safety_h = rows.T @ rows / len(rows)
    path = exact_iterates(h, g, training, learning_rates(rate, steps, **schedule))
    changes = [float(0.5 * d @ safety_h @ d) for d in path]
    threshold = max(changes) * (0.3 + 0.65 * level if seed % 6 else 1.2)
    return {
        "safety_rows": rows.tolist(),
        "safety_hessian": safety_h.tolist(),
        "finetune_hessian": h.tolist(),
        "finetune_gradient": g.tolist(),
        "training": training,
        "collapse_threshold": threshold,
        "true_collapse_step": next((k for k, c in enumerate(changes, 1) if c >= threshold), None),
    }


def step_factors(cases):
    """Factors ≥ 1 between the rollout's and the true collapse step, infinite where only one is None."""
    factors = []
    for case in cases:
        found, truth = (
            report_of(case).forecast.forecasters["rollout"].collapse_step,
            case["true_collapse_step"],
        )
        if (found is None) != (truth is None):
            factors.append(math.inf)
        elif truth is not None:
            factors.append(max(found / truth, truth / found))
    return factors


@pytest.mark.parametrize(
    "cases",
    [CASES, [random_case(seed) for seed in range(24)], [bent_case(seed) for seed in range(24)]],
    ids=["fixed", "rotated", "rotated, curvature of both signs"],
)
def test_the_rollout_is_within_3_percent_in_the_median(cases):
    """At most one case in twenty or more whose collapse is missed or invented."""
    factors = step_factors(cases)
    assert sum(map(math.isinf, factors)) <= 1
    assert statistics.median(factors) <= 1.03


def half_rate_truth(case, steps):
    """Safety changes after each step of the exact recursion at half the planned learning rate."""
    from arisk.training.schedules import learning_rates

    recipe = case["training"]
    rates = learning_rates(
        recipe["learning_rate"] / 2,
        steps,
        schedule=recipe.get("schedule", "constant"),
        warmup_steps=recipe.get("warmup_steps", 0),
    )
    rows, safety_h, h, g = (
        torch.tensor(case[key], dtype=torch.float64)
        for key in ("safety_rows", "safety_hessian", "finetune_hessian", "finetune_gradient")
    )
    return [float((rows @ d).mean() + 0.5 * d @ safety_h @ d) for d in exact_iterates(h, g, recipe, rates)]


@pytest.mark.parametrize("case", CASES, ids=[c["name"] for c in CASES])
def test_what_if_at_half_the_learning_rate(case):
    """The plan's rollout answers for half the rate, as long and twice as long, like the real recursion."""
    grid = report_of(case).forecast.what_if
    (row,) = [row for row in grid.rows if row.factor == 0.5]
    twice = 2 * grid.planned_steps
    for steps, cell in (
        (grid.planned_steps, row.at_plan),
        (twice, row.cells[list(grid.steps).index(twice)]),
    ):
        truth = half_rate_truth(case, steps)
        reached = next((k for k, change in enumerate(truth, 1) if change >= case["collapse_threshold"]), None)
        assert cell.basis == "rollout"
        assert near(cell.collapse_step, reached, 0.18)
        if cell.change is not None and reached is None:
            assert cell.change == pytest.approx(truth[-1], abs=0.3 * case["collapse_threshold"])
