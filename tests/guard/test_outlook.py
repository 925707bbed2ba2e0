"""Arms are forecast, the best two trained, and what was forecast stays on record."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from arisk.base.errors import NumericsError
from arisk.base.task import SampleSet
from arisk.config.plan import BehaviourConfig, GuardConfig, TrainingConfig
from arisk.engine.stage import CostScene
from arisk.gradients import layout_of, measuring
from arisk.guard import methods, outlook
from arisk.guard import run as comparison
from arisk.guard.choice import best_forecasts, forecast_task_cost
from arisk.guard.outlook import saves, shortened
from arisk.guard.plan import ArmPlan, Protection, measured_points
from arisk.guard.record import NEVER_BEGUN, ArmForecast
from arisk.guard.run import ArmComparison, Keep, guard, guard_cost
from arisk.guard.summary import forecast_ended
from arisk.models import load_task
from arisk.training.recipe import recipe_of
from tests.guard.test_references import carried_out, config_of
from tests.guard.test_run import RECIPE, classify, data, read, task_of, timeless

METHODS = ["plain", "ewc", "projection", "replay", "drift_replay", "alpha"]


def run(task=None, steps=60, **config):
    given = {"methods": METHODS, "calibration_steps": 3, **config}
    return guard(
        task or task_of(),
        config=GuardConfig().model_copy(update=read({k: v for k, v in given.items() if k not in PLACES})),
        training=TrainingConfig().model_copy(update={**RECIPE, "learning_rate": 0.005}),
        steps=steps,
        seed=3,
        **{k: v for k, v in given.items() if k in PLACES},
    )


PLACES = ("workspace", "keep")


def without_times(result):
    seen = [dataclasses.replace(one, cpu_seconds=0.0) for one in result.forecasts]
    return timeless(dataclasses.replace(result, forecasts=seen))


def test_all_are_forecast_and_the_best_two_are_trained():
    task = task_of()
    before = [p.detach().clone() for p in task.model.parameters()]
    found = run(task)
    labels = ["plain", "ewc 10", "ewc after 1.5", "projection conflict", "replay 0.1", "replay 0.3"]
    assert [one.label for one in found.forecasts] == [*labels, "drift_replay 0.3"]
    chosen = [one.label for one in found.forecasts if one.chosen]
    assert len(chosen) == 2
    assert chosen == [
        label
        for label in [*labels, "drift_replay 0.3"]
        if label in best_forecasts(found.forecasts, GuardConfig().tolerated_task_loss, 2, found.plain)
    ]
    assert [arm.label for arm in found.arms] == ["plain", *chosen, "alpha 0.25", "alpha 0.5", "alpha 0.75"]
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), before, strict=True))
    assert {one.gradients for one in found.forecasts} == {12}
    assert len(found.forecasts[0].rises) == 12
    # Replay of safety rows is seen to lower their loss, as it does.
    seen = {one.label: one.safety for one in found.forecasts}
    assert seen["replay 0.3"] < seen["replay 0.1"] < seen["plain"]


def test_all_trains_all_and_forecasts_none():
    found = run(all=True)
    assert list(found.forecasts) == []
    assert len(found.arms) == 10


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_shortened_plan_goes_as_far_in_fewer_steps(schedule):
    training = TrainingConfig(schedule=schedule, learning_rate=1e-3, warmup_steps=10)
    recipe, task = recipe_of(training, 200), task_of()
    layout = layout_of(task.model, task.parameter_names)
    plan = ArmPlan(task, layout, recipe, GuardConfig(), BehaviourConfig(), 200, frozenset(), 0)
    short = shortened(plan, 40)
    assert (short.last, short.recipe.horizon) == (40, 40)
    assert float(short.recipe.rates.sum()) == pytest.approx(float(recipe.rates.sum()), rel=0.03)
    # An average over ten steps is one over two.
    assert short.recipe.training.betas == pytest.approx((0.9**5, 0.999**5))
    # A run that stops halfway stops halfway through the schedule.
    half = shortened(dataclasses.replace(plan, last=100), 20)
    assert (half.last, half.recipe.horizon) == (20, 40)


def test_short_runs_are_not_worth_a_forecast():
    assert not saves(12, 10, 2)
    assert not saves(200, 2, 2)
    assert saves(200, 10, 2)


def test_two_runs_agree_and_a_finished_forecast_is_not_made_again(tmp_path, monkeypatch):
    want = without_times(run(workspace=tmp_path))
    monkeypatch.setattr(comparison, "forecast_arm", None)
    assert without_times(run(workspace=tmp_path)) == want
    monkeypatch.undo()
    assert without_times(run()) == want


def test_an_arm_whose_forecast_is_not_a_number_is_named_and_never_chosen():
    found = run(replay={"strengths": [1e308, 0.3]})
    bad = next(one for one in found.forecasts if one.label == "replay 1e+308")
    assert bad.diverged_at is not None
    assert bad.reason
    assert math.isnan(bad.safety)
    assert not bad.chosen
    assert len([one for one in found.forecasts if one.chosen]) == 2


def forecast(set_up, last=60):
    """How a short run says that an arm ended, whose protection is set up so; and when."""
    task = task_of()
    layout = layout_of(task.model, task.parameter_names)
    training = TrainingConfig().model_copy(update=RECIPE)
    settings = GuardConfig(methods=["plain", "replay"])
    plan = ArmPlan.of(task, layout, config=settings, training=training, steps=last, seed=0, behaviour=None)
    with measuring(task.model, layout):
        found = ArmComparison(plan, None)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(outlook, "protection", lambda plan, arm: set_up(plan))
            seen = outlook.forecast_arm(plan, found.names[1], found.forecast_rows)
    return seen.diverged_at, forecast_ended(dataclasses.asdict(seen))


def test_an_arm_that_diverges_in_its_first_step_was_set_up():
    def fails(number):
        raise NumericsError("the loss is nan", where="w", fix="f")

    told = forecast(lambda plan: Protection(fails, {}, "n"))
    assert told == (1, "its forecast diverged at step 1: the loss is nan")
    assert forecast(fails) == (NEVER_BEGUN, "could not be set up: the loss is nan")


def test_an_end_that_is_not_a_number_is_told_at_the_last_step_of_the_short_run():
    def breaks(plan):
        def correct(number):
            for parameter in plan.task.model.parameters() if number == 12 else ():
                parameter.data.fill_(math.nan)
            return {}

        return Protection(None, {}, "n", correct=correct)

    assert forecast(breaks) == (12, "its forecast diverged at step 12: its loss is not finite")


def test_where_larger_steps_diverge_all_arms_are_trained(monkeypatch):
    def diverges(plan, name, rows, rises=False):
        return seen(name.label, math.nan, diverged_at=3, reason="the loss is NaN")

    monkeypatch.setattr(comparison, "forecast_arm", diverges)
    found = run()
    assert [arm.label for arm in found.arms] == [arm.label for arm in run(all=True).arms]
    assert all(one.chosen for one in found.forecasts[1:])


def seen(label, safety, kept=math.nan, task=1.0, **changes):
    made = ArmForecast(label, label, None, safety, kept, math.nan, task, 9, 1.0, None, None)
    return dataclasses.replace(made, **changes)


def test_openings_decide_before_the_loss_and_the_task_before_both():
    forecasts = [
        seen("plain", 1.0, 0.1),
        seen("dull", 0.0, 1.0, task=2.0),
        seen("loss", 0.1, 0.5),
        seen("openings", 0.5, 0.9),
        seen("gone", 0.0, 1.0, diverged_at=3),
    ]
    plain = trained_plain(2.0, 1.0)
    assert best_forecasts(forecasts, 0.05, 2, plain) == ["openings", "loss"]
    assert best_forecasts(forecasts, 0.05, 4, plain) == ["openings", "loss", "dull"]
    unfollowed = [dataclasses.replace(one, kept=math.nan) for one in forecasts]
    assert best_forecasts(unfollowed, 0.05, 2, plain) == ["loss", "openings"]


def trained_plain(start, end):
    return dataclasses.replace(run(all=True).plain, task=[start, end])


def test_an_arm_that_learns_half_as_much_costs_half_of_what_plain_really_learns():
    # The forecast of plain learns a quarter of what plain does: 0.1 of 0.4 nats.
    said, half, whole = (
        seen("plain", 1.0, task=0.9),
        seen("a", 0.0, 1.0, task=0.95),
        seen("b", 0.1, 0.5, task=0.9),
    )
    plain = trained_plain(1.0, 0.6)
    assert forecast_task_cost(half, said, plain) == pytest.approx(0.8 / 0.6 - 1)
    assert forecast_task_cost(whole, said, plain) == pytest.approx(0.0)
    assert best_forecasts([said, half, whole], 0.1, 1, plain) == ["b"]
    # Where plain does not learn, losses are compared as they are.
    assert forecast_task_cost(half, said, trained_plain(1.0, 1.0)) == pytest.approx(0.95 / 0.9 - 1)
    assert math.isnan(forecast_task_cost(half, said, trained_plain(1.0, 0.0)))
    # What is not known leaves no arm out.
    assert best_forecasts([said, half, whole], 0.1, 1, trained_plain(1.0, 0.0)) == ["a"]


def test_the_recommended_arm_is_kept_with_its_weights():
    task, kept = task_of(), []
    batches = list(task.heldout.batches)

    def save(model):
        with torch.no_grad():
            kept.append(torch.cat([classify(model, batch) for batch in batches]))

    found = run(task, keep=Keep(lambda _: "alpha 0.5", save))
    with torch.no_grad():
        start = torch.cat([classify(task.model, batch) for batch in batches])
    arm = next(arm for arm in found.arms if arm.label == "alpha 0.5")
    assert arm.final_safety == pytest.approx((kept[0] - start).tolist(), rel=1e-9, abs=1e-12)
    run(task, keep=Keep(lambda _: None, save))
    assert len(kept) == 1


def test_kept_weights_survive_an_interruption(tmp_path):
    kept = []
    keep = Keep(
        lambda found: next(one.label for one in found.forecasts if one.chosen),
        lambda model: kept.append(torch.cat([p.detach().flatten() for p in model.parameters()])),
    )
    run(workspace=tmp_path, keep=keep)
    run(workspace=tmp_path, keep=keep)
    assert torch.equal(*kept)


def test_weights_of_finished_arms_wait_on_disk(tmp_path):
    task = task_of()
    layout = layout_of(task.model, task.parameter_names)
    settings = GuardConfig(methods=["plain", "alpha"])
    training = TrainingConfig().model_copy(update=RECIPE)
    plan = ArmPlan.of(task, layout, config=settings, training=training, steps=2, seed=0, behaviour=None)
    with measuring(task.model, layout):
        found = ArmComparison(plan, tmp_path, keep=Keep(lambda _: None, lambda _: None))
        arms = found.plain(plan, 0)
    assert len(arms) == len(list(tmp_path.glob("arm-*/end.safetensors"))) == 4
    assert found.ends == {}


@pytest.mark.parametrize("seeds", [1, 3])
def test_arms_read_off_the_plain_run_are_counted_on_every_seed(seeds):
    """Plain and three α; twelve safety and four control rows, four of the task, two answers of 24 tokens."""
    settings = {"methods": ["plain", "alpha"], "seeds": seeds, "generate": 2, "ordinary": 0}
    config = config_of(guard={**settings, "task_samples": 4, "control_samples": 4})
    task = load_task(config, device=torch.device("cpu"))
    passes = guard_cost(CostScene(task, config, Path(), {}, {"gradients": 0.0}, {})).passes
    points = len(measured_points(4))
    assert passes["forward rows"] == seeds * (points + 3) * (12 + 4 + 4)
    assert passes["answer tokens"] == (1 + seeds * 4) * 2 * 24


def test_further_seeds_train_the_same_arms_on_another_order():
    found = carried_out(config_of(), methods=["plain", "replay"], seeds=2)
    assert [(arm.label, arm.seed) for arm in found.arms] == [
        ("plain", 0),
        ("replay 0.1", 0),
        ("replay 0.3", 0),
    ]
    assert [(arm.label, arm.seed) for arm in found.repeats] == [
        ("plain", 1),
        ("replay 0.1", 1),
        ("replay 0.3", 1),
    ]
    assert found.repeats[0].final_safety != found.plain.final_safety
    assert "one order" not in " ".join(found.warnings)
    lists = run(steps=6, methods=["plain", "replay"], seeds=2)
    assert "The data has one order" in " ".join(lists.warnings)


def test_further_seeds_replay_the_rows_at_risk_of_the_first():
    weak = {"strengths": [1e-6, 1e-5, 1e-4], "relaxations": []}
    found = run(methods=["plain", "ewc", "drift_replay"], ewc=weak, seeds=2, tolerated_task_loss=9.0)
    first, again = (
        next(arm for arm in arms if arm.method == "drift_replay") for arms in (found.arms, found.repeats)
    )
    assert "rises most along the plain forecast" in first.note
    assert again.note == first.note


def test_repeats_share_no_order_of_an_epoch():
    config = config_of()
    task = load_task(config, device=torch.device("cpu"))
    layout = layout_of(task.model, task.parameter_names)
    settings = {"config": config.guard, "training": config.training, "steps": 4, "behaviour": None}
    found = ArmComparison(ArmPlan.of(task, layout, seed=0, **settings), None)
    orders, minibatches = [], []
    for plan in map(found.plan_of, range(3)):
        batches = plan.task.finetune.batches
        epochs = [range(e * batches.per_epoch, (e + 1) * batches.per_epoch) for e in range(4)]
        orders += [tuple(row for n in epoch for row in batches.indices(n)) for epoch in epochs]
        minibatches += [plan.seed + epoch for epoch in range(1000)]
    assert len(set(orders)) == len(orders)
    assert len(set(minibatches)) == len(minibatches)


def test_held_out_rows_are_measured_where_there_are_some():
    """Safety rows that the run learns, and held-out ones that it loses: the forecast is of these."""
    easy = SampleSet("safety", data(2, 5, flip=1), classify)
    found = run(task_of(safety=easy), methods=["plain", "replay", "ewc", "projection"])
    assert sum(found.forecasts[0].rises) < 0
    assert found.forecasts[0].safety > 0


def test_what_arms_need_of_the_aligned_model_is_measured_once(monkeypatch):
    counts = {"fisher": 0, "directions": 0, "steps": 0}

    def counting(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(methods, "fisher_diagonals", counting("fisher", methods.fisher_diagonals))
    monkeypatch.setattr(methods, "build_mitigator", counting("directions", methods.build_mitigator))
    monkeypatch.setattr(methods, "_plain_steps", counting("steps", methods._plain_steps))
    given = {"methods": ["plain", "alignguard", "ewc"], "all": True}
    strong = {"alignguard": {"strengths": [3.0, 30.0, "as_given"]}, "ewc": {"strengths": [3.0, 30.0]}}
    found = run(**given, **strong)
    assert len([arm for arm in found.arms if arm.diverged_at is None]) == len(found.arms) == 8
    # Directions as the peer takes them are measured at other logits than those of the other arms.
    assert counts == {"fisher": 1, "directions": 2, "steps": 1}
    for method, strengths in (("ewc", [30.0]), ("alignguard", [30.0]), ("alignguard", ["as_given"])):
        settings = {method: {"strengths": strengths, "relaxations": []}}
        alone = run(methods=["plain", method], all=True, **settings).arms[1]
        again = next(arm for arm in found.arms if arm.label == alone.label)
        assert (again.weights, again.safety) == (alone.weights, alone.safety)
        # What it would take alone, though another arm has measured it.
        assert again.setup_seconds > 0.2 * alone.setup_seconds
