"""What-if cells against real training at those learning rates, and what they refuse to say."""

import math
from dataclasses import replace

import pytest
import torch

from arisk.config.plan import ForecastConfig, RolloutConfig, TrainingConfig
from arisk.forecast.forecasters import not_measured
from arisk.forecast.measured import combined_curve
from arisk.forecast.record import AnswerCount, Curve, RefusalForecast
from arisk.forecast.refusals import refusals_not_measured
from arisk.forecast.rollout import rollout
from arisk.forecast.what_if import (
    ROUGH_FACTOR,
    Known,
    Local,
    Refusals,
    curve_at_rate,
    known,
    over_flow_time,
    what_if,
)
from arisk.training.recipe import recipe_of
from tests.forecast import test_rollout as cases

CONFIG = ForecastConfig(bootstrap_samples=20)
RATE, STEPS = 0.1, 100


def curve(values, *, name="combined", steps=None, spread=0.0):
    """A measured curve over `STEPS` steps."""
    steps = steps or [round(STEPS * i / (len(values) - 1)) for i in range(len(values))]
    return Curve(
        name=name,
        status="measured",
        reason=None,
        kind="forecast",
        steps=steps,
        median=values,
        lower=[v - spread for v in values],
        upper=[v + spread for v in values],
        collapse_step=None,
        collapse_interval=None,
        probability=None,
        horizon=STEPS,
        trusted_until=STEPS,
        notes=[],
    )


def source(values=None, *, local=None, **training):
    """What is known when the combined curve was this one: all losses over a plan of `STEPS` steps."""
    recipe = TrainingConfig(**{"optimizer": "sgd", "learning_rate": RATE, "max_steps": STEPS, **training})
    found = not_measured("combined", "off", STEPS) if values is None else curve(values)
    return Known(recipe, STEPS, CONFIG, 0, over_flow_time(found, recipe, STEPS), local)


def quadratic(end):
    """Every step of end·(k/T)²: what the signed root interpolates exactly."""
    return [end * (k / STEPS) ** 2 for k in range(STEPS + 1)]


def cell(known, factor, steps):
    (row,) = what_if(known, rates=[factor * RATE], lengths=[steps]).rows
    return row.cells[0]


def test_the_plan_is_its_own_curve():
    grid = what_if(source(quadratic(0.4)))
    (row,) = [row for row in grid.rows if grid.is_plan(row, STEPS)]
    assert row.at_plan.change == pytest.approx(0.4)
    assert row.at_plan.collapse_step == 50
    assert not row.at_plan.rough
    assert row.at_plan in row.cells


def counted(end=8, *, trusted=STEPS, safe=29, today=20):
    """Refusals of 20 prompts along the plan: a straight line from `today` to `end`."""
    shares = [(today + (end - today) * k / STEPS) / 20 for k in range(STEPS + 1)]
    return RefusalForecast(
        status="measured",
        reason=None,
        prompts=20,
        counts=[AnswerCount(0, today, 0, 20 - today, 0)],
        ordinary=[],
        steps=list(range(STEPS + 1)),
        median=shares,
        lower=[max(share - 0.1 * (k > 0), 0) for k, share in enumerate(shares)],
        upper=shares,
        threshold=0.1,
        lost_steps={},
        lost_intervals={},
        probability=0.9 if today else None,
        safe_steps=safe if today else None,
        horizon=STEPS,
        trusted_until=trusted,
        safe_responses=20,
        refusing_responses=20,
        safe_loss=None,
        own_loss=None,
        notes=[],
    )


def with_refusals(values, refusals, **settings):
    """What is known of a plan with this loss and these refusals."""
    made = source(values, **settings)
    both = {"combined": curve(values), "local": not_measured("local", "off", STEPS)}
    return known(None, both, config=CONFIG, training=made.training, steps=STEPS, seed=0, refusals=refusals)


@pytest.mark.parametrize(("factor", "steps"), [(1.0, 100), (0.5, 200), (2.0, 50), (0.25, 400)])
def test_refusals_are_read_at_the_same_flow_time(factor, steps):
    grid = what_if(with_refusals(quadratic(0.05), counted()), rates=[factor * RATE], lengths=[steps])
    (found,) = grid.rows[0].cells
    assert (found.refused, found.refused_lower) == (pytest.approx(8 / 20), pytest.approx(6 / 20))
    assert (grid.refused_text(found), found.refusals_kept) == ("8!", False)
    half = cell(with_refusals(quadratic(0.05), counted()), factor, steps // 2)
    assert half.refused == pytest.approx(14 / 20)


def test_a_quiet_loss_does_not_make_a_run_safe_that_loses_its_refusals():
    assert what_if(source(quadratic(0.01))).safest_rate().factor == 1.0
    grid = what_if(with_refusals(quadratic(0.01), counted()))
    plan = next(row for row in grid.rows if row.factor == 1.0)
    texts = [grid.refused_text(each) for each in plan.cells]
    assert texts == ["19", "17!", "14!", "11!", "8!", "?", "?"]
    assert plan.at_plan.stays_below(0.1) is False
    assert plan.safe_steps == 29
    assert grid.safest_rate().factor == 0.25
    assert (grid.prompts, grid.today) == (20, 20)


def test_beyond_what_was_counted_refusals_are_not_known():
    kept = with_refusals(quadratic(0.01), counted(20, safe=STEPS))
    assert cell(kept, 1.0, 200).refused is None
    # A virtual run that ended early was counted as far as it went.
    short = with_refusals(quadratic(0.01), counted(20, trusted=50, safe=50))
    assert cell(short, 1.0, 50).refused == pytest.approx(1.0)
    assert cell(short, 1.0, 80).refused is None


@pytest.mark.parametrize("refusals", [None, counted(0, today=0), refusals_not_measured("off", 100, 0.1)])
def test_without_a_count_nothing_is_said_of_refusals(refusals):
    grid = what_if(with_refusals(quadratic(0.01), refusals))
    assert grid == what_if(source(quadratic(0.01)))
    assert grid.today == 0
    assert {each.refused for row in grid.rows for each in row.cells} == {None}


@pytest.mark.parametrize(("factor", "steps"), [(0.5, 200), (2.0, 50), (0.25, 400), (0.1, 1000)])
def test_equal_flow_time_gives_equal_harm(factor, steps):
    found = cell(source(quadratic(0.4)), factor, steps)
    assert found.state == "measured"
    assert found.change == pytest.approx(0.4)
    assert found.collapse_step == pytest.approx(steps / 2, abs=2)


def test_beyond_the_measured_flow_time_nothing_is_said():
    found = cell(source(quadratic(0.05)), 1.0, STEPS + 1)
    assert found.state == "not_measured"
    assert found.basis == "none"
    assert (found.change, found.peak, found.upper, found.collapse_step) == (None,) * 4
    assert found.stays_below(1.0) is None


def test_a_collapse_inside_the_range_is_told_even_where_the_end_lies_beyond():
    found = cell(source(quadratic(0.4)), 2.0, STEPS)
    assert found.state == "collapses"
    assert found.change is None
    assert found.collapse_step == 25
    assert found.stays_below(0.1) is False


def test_a_peak_is_reported_beside_the_end():
    values = [0.0, 0.2, 0.01]
    found = cell(source(values), 1.0, STEPS)
    assert found.change == pytest.approx(0.01)
    assert found.peak == pytest.approx(0.2)
    assert found.collapse_step is not None


@pytest.mark.parametrize(("factor", "rough"), [(0.1, False), (ROUGH_FACTOR, False), (2.5, True)])
def test_rates_far_above_the_plan_are_rough(factor, rough):
    assert cell(source(quadratic(0.05)), factor, 10).rough is rough


def test_a_run_that_diverged_diverges_at_its_rate_and_above_and_is_unknown_below():
    values = [*quadratic(0.05)[:61], *[math.inf] * 40]
    known = source(values)
    assert cell(known, 1.0, 60).state == "measured"
    at_rate = cell(known, 1.0, STEPS)
    assert at_rate.state == "diverges"
    assert at_rate.collapse_step == 61
    assert cell(known, 2.0, STEPS).collapse_step == 31
    assert cell(known, 0.5, 200).state == "not_measured"


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_are_stretched_and_the_warm_up_is_kept(schedule):
    known = source(quadratic(0.4), schedule=schedule, warmup_steps=10)
    recipe = known.training
    at, values = curve_at_rate(known.rolled, recipe, RATE / 2, 150)
    own = torch.tensor(quadratic(0.4), dtype=torch.float64)
    plan, other = recipe_of(recipe, STEPS), recipe_of(recipe, 150, scale=0.5)
    for step, value in zip(at, values[0].tolist(), strict=True):
        time = float(other.times[step])
        right = int(torch.searchsorted(plan.times, time).clamp(1, STEPS))
        low, high = sorted((float(own[right - 1]), float(own[right])))
        assert low - 1e-12 <= value <= high + 1e-12


def test_the_budget_is_the_longest_run_below_the_threshold():
    known = source(quadratic(0.4))
    budgets = {row.factor: (row.safe_steps, row.at_least) for row in what_if(known).rows}
    assert budgets[1.0] == (49, False)  # 0.4 (k/100)² reaches 0.1 at step 50
    assert budgets[0.5] == (99, False)
    assert budgets[2.0] == (24, False)


@pytest.mark.parametrize("training", [{}, {"schedule": "cosine", "warmup_steps": 10}])
def test_refusals_end_the_budget_where_they_go_first(training):
    """At the planned rate the budget is the plan's; at others as many steps as move the model as far."""
    plan = source(quadratic(0.4), **training)
    kept = float(recipe_of(plan.training, STEPS).times[12])
    both = replace(plan, refusals=Refusals(kept, lost=True, share=0.1))
    grid = what_if(both)
    budgets = {row.factor: row.safe_steps for row in grid.rows}
    for row in grid.rows:
        length = row.safe_steps
        ends = [float(recipe_of(plan.training, k, scale=row.factor).times[-1]) for k in (length, length + 1)]
        assert ends[0] <= kept * (1 + 1e-9) < ends[1]
    assert training or budgets[1.0] == 12
    assert all(budgets[f] < row.safe_steps for f, row in zip(budgets, what_if(plan).rows, strict=True))
    assert "less than 10 % of refusals lost" in grid.limits()
    assert "refusals" not in what_if(plan).limits()
    (cell_of_plan,) = [row.at_plan for row in grid.rows if row.factor == 1]
    assert (cell_of_plan.refusals_kept, cell_of_plan.stays_below(1.0)) == (False, False)
    # Refusals that are kept all the way are known to be kept no further than that.
    end = float(recipe_of(plan.training, STEPS).times[-1])
    whole = what_if(replace(plan, refusals=Refusals(end, lost=False, share=0.1)))
    states = {cell.steps: cell.refusals_kept for row in whole.rows if row.factor == 1 for cell in row.cells}
    assert (states[100], states[200]) == (True, None)
    assert [row.safe_steps for row in whole.rows] == [row.safe_steps for row in what_if(plan).rows]


def test_a_budget_ended_by_the_measurement_says_so():
    known = source(quadratic(0.05))
    budgets = {row.factor: (row.safe_steps, row.at_least) for row in what_if(known).rows}
    assert budgets[1.0] == (100, True)
    assert budgets[0.25] == (400, True)
    rough = source([*quadratic(0.05)[:61], *[math.inf] * 40])
    assert what_if(rough, rates=[RATE], lengths=[10]).rows[0].safe_steps == 60
    assert not what_if(rough, rates=[RATE], lengths=[10]).rows[0].at_least


def test_the_largest_rate_below_the_alarm_is_named_with_what_was_not_measured():
    grid = what_if(source(quadratic(0.02)))
    assert grid.safest_rate().factor == 1.0
    assert "up to a learning rate of 0.1 (1 × the plan); 0.2 and above were not measured" in (
        grid.rate_sentence()
    )
    harmful = what_if(source(quadratic(0.4)))
    assert harmful.safest_rate().factor == 0.25  # 0.4 · 0.25² = 0.025 < 0.03 < 0.4 · 0.5²
    assert "not measured" not in harmful.rate_sentence()
    nothing = what_if(source(None))
    assert nothing.safest_rate() is None
    assert "was measured" in nothing.rate_sentence()
    assert all(row.safe_steps is None for row in nothing.rows)


def scored_like(c, probe_end):
    """A local model of one direction with curvature 1, and its probe."""

    class Scored:
        krylov_t = torch.ones(1, 1, dtype=torch.float64)
        krylov_beta = 1.0
        c_krylov = torch.tensor([[c], [-c]], dtype=torch.float64)
        probe_times = torch.tensor([0.0, probe_end], dtype=torch.float64)

    return Scored()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_local_model_answers_where_it_is_trusted_and_no_further(momentum):
    local = Local(scored_like(0.5, 4.0), 4.0, plain=True)
    only_local = source(None, local=local, momentum=momentum)
    steps = 30 if not momentum else 3
    found = cell(only_local, 1.0, steps)
    assert found.basis == "local"
    z, w = 0.0, 0.0
    for _ in range(steps):
        w = momentum * w + 1.0 + z
        z -= RATE * w
    assert found.change == pytest.approx(0.5 * (0.5 * z) ** 2, rel=1e-9)
    assert cell(only_local, 1.0, 60).state in ("not_measured", "collapses")
    assert cell(only_local, 1.0, 60).change is None


def test_a_local_model_trusted_for_less_than_a_step_says_nothing():
    local = Local(scored_like(0.5, 4.0), 0.5 * RATE, plain=True)
    (row,) = what_if(source(None, local=local), rates=[RATE], lengths=[1, 10]).rows
    assert [found.state for found in row.cells] == ["not_measured"] * 2
    assert row.safe_steps is None


def test_a_local_model_that_diverges_says_so():
    local = Local(scored_like(0.5, 1e9), 1e9, plain=True)
    found = cell(source(None, local=local), 25.0, 5000)
    assert found.state == "diverges"
    assert found.collapse_step is not None


def test_a_frozen_preconditioner_is_rough():
    local = Local(scored_like(0.1, 10.0), 10.0, plain=False)
    found = cell(source(None, local=local), 0.5, 10)
    assert found.rough
    assert "preconditioner" in found.note


def test_the_rollout_comes_before_the_local_model():
    local = Local(scored_like(0.01, 100.0), 100.0, plain=True)
    both = source(quadratic(0.05), local=local)
    assert cell(both, 1.0, STEPS).basis == "rollout"
    assert cell(both, 1.0, 2 * STEPS).basis == "local"


@pytest.mark.parametrize(
    ("factor", "kept"), [(1.0, True), (1.15, True), (0.85, True), (1.6, False), (0.4, False), (None, False)]
)
def test_a_local_model_that_contradicts_the_rollout_fills_no_cell(factor, kept):
    """Its probe fits; over the plan it may leave the rollout by a fifth, one that diverged by nothing."""

    slope, end = 0.03, 0.5 * (0.03 * RATE * STEPS) ** 2

    class Scored:
        krylov_t = torch.zeros(1, 1, dtype=torch.float64)
        krylov_beta = 1.0
        c_krylov = torch.tensor([[slope], [-slope]], dtype=torch.float64)
        c_update = torch.tensor([slope, -slope], dtype=torch.float64)
        probe_times = torch.linspace(0, 40, 9, dtype=torch.float64)
        probe_safety = (0.5 * (slope * probe_times) ** 2).expand(2, -1)

    rolled = quadratic(end)
    said = quadratic(end * (factor or 1.0))
    if factor is None:
        rolled = [*rolled[:-1], math.inf]
    recipe = TrainingConfig(optimizer="sgd", learning_rate=RATE, max_steps=STEPS)
    curves = {"combined": curve(rolled), "local": curve(said, name="local")}
    source = known(Scored(), curves, config=CONFIG, training=recipe, steps=STEPS, seed=0)
    assert (source.local is not None) == kept
    beyond = cell(source, 0.5, 4 * STEPS)
    assert beyond.basis == ("local" if kept else "none")
    if factor == 1.0:
        assert beyond.change == pytest.approx(4 * end)
    if not kept:
        assert "the rollout contradicts it" in " ".join(what_if(source).notes)


REAL = [
    {"optimizer": "sgd", "learning_rate": 0.1},
    {"optimizer": "sgd", "learning_rate": 0.02, "momentum": 0.9},
    {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1},
    {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "cosine", "warmup_steps": 10},
]


def trained(training, steps):
    """Safety changes from step 0 on along an ordinary torch loop."""
    batches = cases.data(2, cases.MANY)
    losses = cases.truth_of(cases.net(), batches, training, steps)
    with torch.no_grad():
        start = float(torch.cat([cases.classify(cases.net(), b) for b in cases.data(1, 4)]).mean())
    return [0.0, *[loss - start for loss in losses]]


@pytest.mark.parametrize("training", REAL, ids=str)
def test_a_run_answers_for_half_the_rate_over_twice_the_steps(training):
    """Real runs answer for one another, and a rollout errs no more than it does on its own plan."""
    steps = 200
    recipe = TrainingConfig(**training)
    half = {**training, "learning_rate": training["learning_rate"] / 2}
    own, slow = trained(training, steps), torch.tensor(trained(half, 2 * steps), dtype=torch.float64)
    largest = slow.abs().max()

    def errors(known_curve):
        over = over_flow_time(known_curve, recipe, steps)
        at, values = curve_at_rate(over, recipe, half["learning_rate"], 2 * steps)
        told = ~torch.isnan(values[0])
        assert float(told.double().mean()) > 0.9
        return (values[0] - slow[at])[told].abs() / largest

    between = errors(curve(own, steps=list(range(steps + 1))))
    assert float(between.median()) <= 0.02
    assert float(between.max()) <= 0.07
    task = cases.task_of(finetune=cases.data(2, cases.MANY))
    measured = rollout(task, config=RolloutConfig(), training=recipe, steps=steps)
    combined = combined_curve(measured, recipe_of(recipe, steps), CONFIG, 0)
    wrong = max(abs(a - own[s]) for s, a in zip(combined.steps, combined.median, strict=True))
    assert float(errors(combined).max()) <= wrong / float(largest) + 0.07
