"""The virtual run: real where it is real, close where it leaps, and without traces."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from arisk.base.errors import NumericsError
from arisk.base.task import SampleSet, Task
from arisk.config.plan import BehaviourConfig, ForecastConfig, RolloutConfig, TrainingConfig
from arisk.forecast.leap import (
    Block,
    Leaper,
    pilot_length,
    planned_points,
    rollout_cost,
    segment_count,
    segment_ends,
)
from arisk.forecast.measured import combined_curve, pilot_curve, rollout_curve
from arisk.forecast.rollout import forward_rows, rollout, skipped_rollout
from arisk.gradients import layout_of, measuring
from arisk.gradients.curvature import losses_between, outputs_of
from arisk.models.openings import OpeningScores
from arisk.training import state as run_state
from arisk.training.loop import BatchStream, PlannedRun
from arisk.training.recipe import recipe_of
from tests.plain_loop import plain_training

#: Fine-tuning batches: few are seen again and again, many are noisy.
FEW, MANY = 7, 60
RECIPES = [
    {"optimizer": "sgd", "learning_rate": 0.1},
    {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.5},
    {"optimizer": "adamw", "learning_rate": 0.02, "schedule": "cosine", "warmup_steps": 5},
    {"optimizer": "sgd", "learning_rate": 0.1, "gradient_accumulation": 3},
]


def classify(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def data(seed, batches, size=8):
    """Points labelled by a fixed teacher."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(5, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    points = [torch.randn(size, 5, generator=generator, dtype=torch.float64) for _ in range(batches)]
    return [(x, (x @ teacher).argmax(1)) for x in points]


def task_of(model=None, finetune=None, *, control=True, loss_fn=classify):
    model = model or net()
    return Task(
        model=model,
        safety=SampleSet("safety", data(1, 4), loss_fn),
        finetune=SampleSet("finetune", finetune if finetune is not None else data(2, FEW), loss_fn),
        control=SampleSet("control", data(3, 2), loss_fn) if control else None,
        parameter_names=[name for name, _ in model.named_parameters()],
    )


class Teller:
    """Writes what the first weight is; its openings fall with the distance that the model has gone."""

    def __init__(self):
        self.start = net()[0].weight.detach().clone()

    def __call__(self, model, rows, limit):
        return [f"{row} {float(model[0].weight.detach().sum()):.9f}" for row in rows]

    def text(self, tokens):
        return str(list(tokens))

    def tokens(self, model, rows, limit):
        return [[row, 1, 2, 3] for row in rows]

    def followed(self, model, rows, openings):
        gone = float((model[0].weight.detach() - self.start).norm())
        log_p = torch.full((len(rows), len(openings[0])), -gone, dtype=torch.float64)
        return OpeningScores(log_p, torch.full((len(rows),), 0 if gone > 0.5 else len(openings[0])))


def telling(task):
    """The task with prompts that are answered."""
    rows = [{"prompt": f"question {i}", "response": "No.", "line": i} for i in range(32)]
    return replace(task, safety=replace(task.safety, rows=rows, generate=Teller()))


def run(task, training, steps, **config):
    return rollout(task, config=RolloutConfig(**config), training=TrainingConfig(**training), steps=steps)


def truth_of(model, batches, training, steps):
    """Safety losses along an ordinary training loop written with torch alone."""
    curve = []
    for _ in plain_training(model, classify, batches, training, steps):
        with torch.no_grad():
            curve.append(float(torch.cat([classify(model, b) for b in data(1, 4)]).mean()))
    return curve


@pytest.mark.parametrize("training", RECIPES, ids=str)
def test_a_short_run_is_the_real_one(training):
    measured = run(task_of(), training, 20)
    truth = truth_of(net(), data(2, FEW), training, 20)
    start = float(torch.cat([classify(net(), b) for b in data(1, 4)]).mean().detach())
    for step, change in zip(measured.steps[1:], measured.safety.mean(0)[1:], strict=True):
        assert float(change) == pytest.approx(truth[step - 1] - start, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("training", RECIPES, ids=str)
def test_a_long_run_is_close_to_the_real_one(training):
    steps = 400
    measured = run(task_of(finetune=data(2, MANY)), training, steps)
    truth = truth_of(net(), data(2, MANY), training, steps)
    start = float(torch.cat([classify(net(), b) for b in data(1, 4)]).mean().detach())
    found = measured.safety.mean(0)
    pieces = training.get("gradient_accumulation", 1)
    assert measured.gradient_evaluations <= 0.4 * steps * pieces
    real = torch.tensor([truth[step - 1] - start for step in measured.steps[1:]], dtype=torch.float64)
    error = (found[1:] - real).abs() / real.abs().max()
    assert float(error.median()) <= 0.08
    assert float(error[-1]) <= 0.12


def test_cost_is_logarithmic_and_within_the_limits():
    for horizon in (100, 200, 500, 1000, 2000, 20_000, 1_000_000):
        pilot, points = planned_points(horizon, RolloutConfig())
        cost = pilot + 6 * (len(points) - points.index(pilot) - 1)
        assert cost <= 0.4 * horizon
        assert cost <= 85 + 75 * math.log10(horizon / 200) or horizon < 200
        assert points == sorted(set(points))
        assert points[-1] == horizon
    assert planned_points(2000, RolloutConfig())[0] == 20


@pytest.mark.parametrize("horizon", [1, 2, 3, 7, 19, 20, 21, 25, 33, 60, 99])
def test_short_horizons(horizon):
    pilot, points = planned_points(horizon, RolloutConfig())
    assert points[-1] == horizon
    assert points == sorted(set(points))
    assert 1 <= pilot <= horizon


@pytest.mark.parametrize("steps", [5, 20, 33, 60, 150, 400])
def test_the_cost_is_known_before(steps):
    made = run(task_of(finetune=data(2, MANY)), RECIPES[0], steps)
    assert rollout_cost(steps, RolloutConfig()) == (made.gradient_evaluations, made.safety_passes)


def large(**changes):
    """The same task with 64 safety rows and 40 control rows."""
    task = task_of(finetune=data(2, MANY))
    return replace(
        task,
        safety=SampleSet("safety", data(1, 8), classify),
        control=SampleSet("control", data(3, 5), classify),
        **changes,
    )


def test_few_rows_at_most_points_tell_what_all_rows_do():
    every = run(large(), RECIPES[2], 200, leading_samples=1000)
    few = run(large(), RECIPES[2], 200, leading_samples=8)
    assert every.whole_steps == every.steps == few.steps
    assert not any(every.safety_error)
    inner = [step for step in few.whole_steps if step not in (0, few.pilot_steps, 200)]
    assert {0, few.pilot_steps, 200} <= set(few.whole_steps) < set(few.steps)
    assert 1 <= len(inner) <= 3
    for i, step in enumerate(few.steps):
        apart = float((few.safety[:, i].mean() - every.safety[:, i].mean()).abs())
        if step in few.whole_steps:
            torch.testing.assert_close(few.safety[:, i], every.safety[:, i])
            assert few.safety_error[i] == 0
        else:
            assert few.safety_error[i] > 0
            assert apart <= 3 * few.safety_error[i] + 1e-9
    torch.testing.assert_close(few.control[:, -1], every.control[:, -1])
    assert bool(few.control.isfinite().all())
    own = torch.isclose(few.extrapolated, every.extrapolated).all(1)
    assert int(own.sum()) == 8
    at_one = few.scales.index(1.0)
    pilot = few.steps.index(few.pilot_steps)
    for measured in (few, every):
        torch.testing.assert_close(measured.extrapolated[:, at_one], measured.safety[:, pilot])


def test_what_was_left_out_widens_the_interval():
    few, config = run(large(), RECIPES[2], 200, leading_samples=8), ForecastConfig()
    plan = recipe_of(TrainingConfig(**RECIPES[2]), 200)
    sure = replace(few, safety_error=[0.0] * len(few.steps))
    unsure = replace(few, safety_error=[0.0, *[0.5] * (len(few.steps) - 1)])
    known, wide = (rollout_curve(record, plan, config, 0) for record in (sure, unsure))
    assert wide.median == known.median
    assert wide.upper[-1] - wide.lower[-1] > known.upper[-1] - known.lower[-1] + 0.5


@pytest.mark.parametrize("steps", [20, 60, 400])
def test_measured_rows_are_counted_before(steps, monkeypatch):
    counted = []

    def counts(model, batch):
        if not torch.is_grad_enabled():
            counted.append(len(batch[1]))
        return classify(model, batch)

    task = large()
    sets = {name: replace(getattr(task, name), loss_fn=counts) for name in ("safety", "control")}
    config = RolloutConfig(leading_samples=8)
    made = rollout(replace(task, **sets), config=config, training=TrainingConfig(**RECIPES[2]), steps=steps)
    extrapolated = 2 * 8 + len(made.scales) * 8 if made.scales else 0
    told = forward_rows(steps, config, {"safety": 64, "control": 40, "followed": 0, "ordinary": 0})
    inner = len([s for s in made.whole_steps if s not in (0, made.pilot_steps, steps)])
    # What is not known before: at how many inner points safety has moved.
    known = told - (56 + 8) - (2 * 8 if made.scales else 0)
    assert sum(counted) - extrapolated == known + (56 + 8) * inner


def test_segments_grow():
    ends = segment_ends(20, 2000, 20, 5)
    lengths = [b - a for a, b in zip([20, *ends], ends, strict=False)]
    assert lengths == sorted(lengths)
    assert lengths[0] >= 5
    assert segment_ends(20, 20, 3, 5) == []
    assert segment_ends(10, 18, 3, 5) == [15, 18]
    assert pilot_length(60, None, 5) == 12
    assert pilot_length(8, 20, 5) == 8
    assert segment_count(200, 20, 5) == 8


def test_the_model_is_left_as_found():
    model = net()
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    run(task_of(model), RECIPES[2], 120)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert bool((model[0].weight.grad == 1).all())
    assert torch.equal(torch.get_rng_state(), random)


def test_resumes_inside_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(run_state, "SAVE_SHARE", 0.0)
    settings = {
        "config": RolloutConfig(leading_samples=6),
        "training": TrainingConfig(**RECIPES[2]),
        "steps": 150,
        "behaviour": BehaviourConfig(prompts=6, opening_tokens=3),
    }
    whole = rollout(telling(task_of()), **settings)
    real, stopped = run_state.save_state, []

    def stop(workspace, planned_run, track, block):
        real(workspace, planned_run, track, block)
        if track.steps[-1] > 40:
            stopped.append(track.steps[-1])
            raise KeyboardInterrupt

    monkeypatch.setattr(run_state, "save_state", stop)
    model = net()
    before = model[0].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        rollout(telling(task_of(model)), **settings, workspace=tmp_path)
    assert torch.equal(model[0].weight, before)
    monkeypatch.setattr(run_state, "save_state", real)
    steps_taken = []
    step = PlannedRun.step
    monkeypatch.setattr(PlannedRun, "step", lambda self, n: (steps_taken.append(n), step(self, n))[1])
    load, loaded = run_state.load_state, []
    watched = lambda *args: loaded.append(load(*args)) or loaded[-1]  # noqa: E731 - a wrapper
    monkeypatch.setattr("arisk.forecast.rollout.load_state", watched)
    resumed = rollout(telling(task_of()), **settings, workspace=tmp_path)
    # Kernels round by where memory begins: losses lie apart, as when they were measured.
    assert all(losses.untyped_storage().nbytes() == losses.nbytes for losses in loaded[0][0].safety)
    assert min(steps_taken) > stopped[0]
    assert torch.equal(resumed.safety, whole.safety)
    assert torch.equal(resumed.control, whole.control)
    assert torch.equal(resumed.extrapolated, whole.extrapolated)
    assert resumed.gradient_evaluations == whole.gradient_evaluations
    one, two = resumed.behaviour.safety, whole.behaviour.safety
    assert torch.equal(one.log_p, two.log_p)
    assert torch.equal(one.kept, two.kept)
    assert one.answers == two.answers


def test_what_the_model_says_is_followed_and_answered_where_due():
    settings = {"config": RolloutConfig(), "training": TrainingConfig(**RECIPES[2]), "steps": 150}
    watched = rollout(telling(task_of()), **settings, behaviour=BehaviourConfig(prompts=6, opening_tokens=3))
    plain = rollout(task_of(), **settings)
    assert torch.equal(watched.safety, plain.safety)
    assert (plain.behaviour.status, plain.behaviour.reason) == ("not_measured", "behaviour.prompts is 0")
    said = watched.behaviour.safety
    assert said.steps == [step for step in watched.steps if step != 3]
    assert said.log_p.shape == (6, len(said.steps), 3)
    answered = [made.step for made in said.answers]
    assert {0, 150} <= set(answered)
    # The openings turn once, and answers come there unasked.
    turned = next(s for s, kept in zip(said.steps, said.kept[0].tolist(), strict=True) if kept == 0)
    assert turned in answered
    assert len(answered) <= 4
    assert len({made.texts[0] for made in said.answers[1:]}) == len(answered) - 1


def test_a_damaged_state_starts_again(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(run_state, "SAVE_SHARE", 0.0)
    settings = {"config": RolloutConfig(), "training": TrainingConfig(**RECIPES[0]), "steps": 60}
    whole = rollout(task_of(), **settings, workspace=tmp_path)
    (state,) = tmp_path.glob("state-*.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    assert torch.equal(rollout(task_of(), **settings, workspace=tmp_path).safety, whole.safety)


def test_diverging_training_is_recorded():
    def exploding(model, batch):
        return -model(batch[0]).pow(4).sum(1)

    measured = rollout(
        Task(
            model=net(),
            safety=SampleSet("safety", data(1, 2), classify),
            finetune=SampleSet("finetune", data(2, 3), exploding),
            parameter_names=[name for name, _ in net().named_parameters()],
        ),
        config=RolloutConfig(),
        training=TrainingConfig(optimizer="sgd", learning_rate=5.0, max_grad_norm=None),
        steps=100,
    )
    assert measured.diverged_at is not None
    curve = combined_curve(measured, recipe_of(TrainingConfig(max_grad_norm=None), 100), ForecastConfig(), 0)
    assert curve.collapse_step is not None
    assert math.isinf(curve.median[-1])
    assert curve.trusted_until == measured.steps[-1]
    assert "diverges" in " ".join(curve.notes)


def test_a_broken_safety_loss_is_named():
    with pytest.raises(NumericsError, match="safety loss of the aligned model"):
        bad = SampleSet("safety", data(1, 2), lambda m, b: classify(m, b) / 0)
        rollout(
            Task(net(), bad, SampleSet("finetune", data(2, 3), classify), ["0.weight"]),
            config=RolloutConfig(),
            training=TrainingConfig(max_grad_norm=None),
            steps=10,
        )


def test_no_control_data_is_said():
    assert any("No control data" in said for said in run(task_of(control=False), RECIPES[0], 10).warnings)
    assert run(task_of(control=False), RECIPES[0], 10).control is None


def test_distance_correction_is_that_of_a_random_walk():
    """The corrected leap is as long, in the root mean square, as a real noisy walk."""
    generator = torch.Generator().manual_seed(0)
    drift, sigma, q, length, size = 0.2, 1.0, 5, 60, 20_000
    noise = sigma * torch.randn(q + length, size, dtype=torch.float64, generator=generator)
    gradients = drift + noise
    mean, square = gradients[:q].mean(0), gradients[:q].square().mean(0)
    layer = nn.Linear(1, 1, bias=False).double()
    task = Task(layer, SampleSet("s", [], classify), SampleSet("f", [], classify), ["weight"])
    planned_run = PlannedRun(
        task,
        layout_of(layer, ["weight"]),
        recipe_of(TrainingConfig(optimizer="sgd", max_grad_norm=None), length),
    )
    leaper = Leaper(planned_run)
    (factor,) = leaper._distance_factors(Block([-mean], [mean], [square], q, 0.0), length)
    real = gradients[q:].sum(0).norm()
    assert float(factor * length * mean.norm()) == pytest.approx(float(real), rel=0.06)
    assert factor < 0.9
    assert Leaper(planned_run, distance_correction=False)._distance_factors(
        Block([-mean], [mean], [square], q, 0.0), length
    ) == [1.0]


def test_speed_control_follows_the_flow_into_a_valley():
    """A leap far beyond the minimum of a parabola ends where the flow would: near the minimum."""

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def parabola(model, batch):
        return 0.5 * model.x**2 + 0 * batch.mean()

    model, length, rate = Point(), 50, 0.1
    batches = [torch.zeros(1, 1, dtype=torch.float64)]
    task = Task(model, SampleSet("s", batches, parabola), SampleSet("f", batches, parabola), ["x"])
    layout = layout_of(model, ["x"])
    training = TrainingConfig(optimizer="sgd", learning_rate=rate, max_grad_norm=None)
    with measuring(model, layout):
        for control, low, high in ((True, -0.2, 0.2), (False, -5.0, -2.0)):
            planned_run = PlannedRun(task, layout, recipe_of(training, 200))
            with torch.no_grad():
                model.x.fill_(1.0)
            leaper = Leaper(planned_run, speed_control=control)
            block = leaper.real(0, 3, 3)
            leaper.leap(block, 3, length)
            assert low <= model.x.item() <= high


@pytest.mark.parametrize("curvature", [-1.2, -0.6, 0.0, 0.6, 3.0])
def test_a_leap_ends_where_the_flow_along_a_parabola_does(curvature):
    """From x = 0 with slope −1: (1 − e^{−κt})/κ after flow time t, exact for curvatures of both signs.

    The leap reads κt off its end; a gain in speed beyond a = −1 is not believed.
    """

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def parabola(model, batch):
        return 0.5 * curvature * model.x**2 - model.x + 0 * batch.mean()

    model, length, rate = Point(), 1000, 1e-3
    batches = [torch.zeros(1, 1, dtype=torch.float64)]
    task = Task(model, SampleSet("s", batches, parabola), SampleSet("f", batches, parabola), ["x"])
    layout = layout_of(model, ["x"])
    with measuring(model, layout):
        training = TrainingConfig(optimizer="sgd", learning_rate=rate, max_grad_norm=None)
        planned_run = PlannedRun(task, layout, recipe_of(training, 2000))
        leaper = Leaper(planned_run)
        share = leaper.leap(leaper.real(0, 2, 2), 2, length)
    flow = length * rate
    believed = max(curvature, -1.0) * flow
    expected = -math.expm1(-believed) / believed if believed else 1.0
    assert share == pytest.approx(expected, rel=0.01)
    assert model.x.item() == pytest.approx(2 * rate + flow * expected, rel=0.01)


@pytest.mark.parametrize(
    ("curvature", "direction", "claimed"),
    [(3.0, 1.0, -1.0), (3.0, 1.0, -8.0), (3.0, 1.0, 0.5), (12.0, 1.0, -8.0), (3.0, -1.0, 1.0)],
)
def test_a_leap_over_which_the_loss_rises_is_pulled_back_by_its_own_batch(curvature, direction, claimed):
    """The checking batch is a valley from slope −1; whatever slope the block claims, the valley decides.

    Downhill the leap ends where the flow does, (1 − e^{−κt})/κ; a way that leads uphill from the
    start is taken back but for a twentieth.
    """

    class Point(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def valley(model, batch):
        return 0.5 * curvature * model.x**2 - model.x + 0 * batch.mean()

    model, length, rate = Point(), 1000, 1e-3
    batches = [torch.zeros(1, 1, dtype=torch.float64)]
    task = Task(model, SampleSet("s", batches, valley), SampleSet("f", batches, valley), ["x"])
    layout = layout_of(model, ["x"])
    told = [torch.tensor([value], dtype=torch.float64) for value in (direction, claimed, claimed**2)]
    with measuring(model, layout):
        training = TrainingConfig(optimizer="sgd", learning_rate=rate, max_grad_norm=None)
        planned_run = PlannedRun(task, layout, recipe_of(training, 2000))
        leaper = Leaper(planned_run, distance_correction=False)
        leaper.leap(Block([told[0]], [told[1]], [told[2]], 2, 0.0), 0, length)
    flow = length * rate
    expected = -math.expm1(-curvature * flow) / curvature if direction > 0 else -flow / 20
    assert model.x.item() == pytest.approx(expected, rel=0.01)


def test_outputs_are_extrapolated_exactly_where_they_move_straight():
    model = nn.Linear(5, 3).double()
    (batch,) = data(4, 1)
    first = outputs_of(model, batch, classify)
    start = model.weight.detach().clone()
    step = torch.randn(3, 5, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(start + step)
    last = outputs_of(model, batch, classify)
    found = losses_between(model, batch, classify, first, last, [0.0, 1.0, 4.0])
    for column, scale in zip(found.T, (0.0, 1.0, 4.0), strict=True):
        with torch.no_grad():
            model.weight.copy_(start + scale * step)
            assert torch.allclose(column, classify(model, batch))
    assert outputs_of(model, batch, lambda m, b: m.weight.sum(1)) is None
    assert losses_between(model, batch, lambda m, b: m(b[0]).sum(), first, last, [1.0]) is None


def test_batches_by_number_from_anything_iterable():
    class Stream:
        def __iter__(self):
            return iter([torch.tensor([i]) for i in range(5)])

    for source in (Stream(), list(Stream())):
        stream = BatchStream(SampleSet("f", source, classify), torch.device("cpu"))
        assert [int(stream.at(i)) for i in (0, 1, 4, 5, 13, 2, 11)] == [0, 1, 4, 0, 3, 2, 1]
    endless = torch.utils.data.DataLoader(torch.arange(6.0), batch_size=2)
    stream = BatchStream(SampleSet("f", endless, classify), torch.device("cpu"))
    assert [stream.at(i).tolist() for i in (2, 3)] == [[4.0, 5.0], [0.0, 1.0]]


def test_curves_agree_with_the_measurement_and_widen():
    measured = run(task_of(), {"optimizer": "sgd", "learning_rate": 0.3}, 300)
    plan = recipe_of(TrainingConfig(optimizer="sgd", learning_rate=0.3, max_grad_norm=None), 300)
    config = ForecastConfig(bootstrap_samples=200)
    curve = rollout_curve(measured, plan, config, 0)
    for step, change in zip(measured.steps, measured.safety.mean(0).tolist(), strict=True):
        if step in curve.steps:
            at = list(curve.steps).index(step)
            assert curve.median[at] == pytest.approx(change, rel=1e-9, abs=1e-12)
            assert curve.lower[at] <= curve.upper[at]
    pilot = pilot_curve(measured, plan, config, 0)
    combined = combined_curve(measured, plan, config, 0)
    for a, b, c in zip(curve.median, pilot.median, combined.median, strict=True):
        assert min(a, b) - 1e-9 <= c <= max(a, b) + 1e-9
    assert all(
        curve.status != "measured"
        for curve in [
            f(skipped_rollout("off"), plan, config, 0) for f in (rollout_curve, pilot_curve, combined_curve)
        ]
    )


def test_a_wider_sample_spread_gives_a_wider_interval():
    measured = run(task_of(), {"optimizer": "sgd", "learning_rate": 0.3}, 20)
    plan = recipe_of(TrainingConfig(optimizer="sgd", learning_rate=0.3, max_grad_norm=None), 20)
    narrow = rollout_curve(measured, plan, ForecastConfig(confidence=0.5), 0)
    wide = rollout_curve(measured, plan, ForecastConfig(confidence=0.95), 0)
    assert wide.upper[-1] - wide.lower[-1] > narrow.upper[-1] - narrow.lower[-1] > 0
