"""Rare rows: found by their loss, left out of the few real steps, brought in with their true weight."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from arisk.base.task import RowBatches, SampleSet, Task
from arisk.config.plan import RolloutConfig, TrainingConfig
from arisk.forecast.leap import Leaper, RareRows, outliers
from arisk.forecast.rollout import rollout
from arisk.gradients import layout_of, measuring
from arisk.training import state as run_state
from arisk.training.loop import PlannedRun
from arisk.training.recipe import recipe_of

SIZE, ROWS, RARE = 4, 100, (13, 57)


class Rows:
    """Rows of a tensor in a planned order."""

    size = SIZE

    def __init__(self, rows, seed=0):
        self.rows = rows
        self.order = torch.cat(
            [
                torch.randperm(len(rows), generator=torch.Generator().manual_seed(100 * seed + i))
                for i in range(40)
            ]
        ).tolist()

    @property
    def row_count(self):
        return len(self.rows)

    def indices(self, number):
        return self.order[number * SIZE : (number + 1) * SIZE]

    def of(self, rows):
        return self.rows[list(rows)]

    def sample(self, count):
        return list(range(min(count, len(self.rows))))

    def __getitem__(self, number):
        return self.of(self.indices(number))


class Point(nn.Module):
    """A parameter vector x."""

    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.zeros(3, dtype=torch.float64))


def slope(model, batch):
    """Row losses ⟨row, x⟩ + level: a linear loss, whose gradients are the rows."""
    return batch[:, :3] @ model.x + batch[:, 3]


def linear_rows():
    rows = torch.zeros(ROWS, 4, dtype=torch.float64)
    rows[:, 0] = -1
    rows[:, 3] = 0.1 * torch.rand(ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[list(RARE), 1] = -7
    rows[list(RARE), 3] = 5
    return rows


def linear_task(batches):
    axes = [torch.eye(3, 4, dtype=torch.float64)]
    return Task(Point(), SampleSet("s", axes, slope), SampleSet("f", batches, slope), ["x"])


def test_outliers():
    losses = torch.tensor([0.1, 9.0, 0.2, 0.15, 12.0, -math.inf, 0.12], dtype=torch.float64)
    assert outliers(losses) == [4, 1]
    assert outliers(torch.rand(100, generator=torch.Generator().manual_seed(0))) == []
    assert outliers(torch.full((5,), 2.0)) == []


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rare_rows_move_a_linear_loss_by_their_true_share(momentum):
    """After the pilot every coordinate has moved as the mean of all rows moves it, to rounding."""
    steps, rate = 1000, 0.01
    batches = Rows(linear_rows())
    assert isinstance(batches, RowBatches)
    training = TrainingConfig(optimizer="sgd", learning_rate=rate, momentum=momentum, max_grad_norm=None)
    made = rollout(linear_task(batches), config=RolloutConfig(), training=training, steps=steps)
    pilot = made.steps.index(made.pilot_steps)
    moved = made.safety[:, -1] - made.safety[:, pilot]
    expected = -batches.rows[:, :3].mean(0) * rate * (steps - made.pilot_steps) / (1 - momentum)
    # A heavy ball enters the first leap with what the pilot saw: the rare pull is off by a few steps.
    assert torch.allclose(moved, expected, rtol=1e-9 if momentum == 0 else 0.03)


def crowded(batches, rows, pilot=20, steps=5):
    """The planned order changed so that the pilot's last steps hold these rows, one a step."""
    at = pilot * SIZE - SIZE
    for row in rows[:steps]:
        other = batches.order.index(row)
        batches.order[at], batches.order[other] = row, batches.order[at]
        at -= SIZE
    return batches


def test_rare_rows_that_the_pilot_met_too_often_count_by_their_true_share():
    """A linear loss again: two in a hundred rows, but two in the pilot's last twenty."""
    steps, rate = 1000, 0.01
    batches = crowded(Rows(linear_rows()), RARE)
    training = TrainingConfig(optimizer="sgd", learning_rate=rate, momentum=0.0, max_grad_norm=None)
    config = RolloutConfig(distance_correction=False)
    made = rollout(linear_task(batches), config=config, training=training, steps=steps)
    pilot = made.steps.index(made.pilot_steps)
    moved = made.safety[:, -1] - made.safety[:, pilot]
    expected = -batches.rows[:, :3].mean(0) * rate * (steps - made.pilot_steps)
    assert torch.allclose(moved, expected, rtol=1e-9)
    assert made.kept_share == pytest.approx([1.0] * len(made.kept_share))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_surplus_of_rare_rows_is_taken_back_within_the_leap(optimizer):
    """The pilot met rows 0 to 3, the batch of the stratum pulls elsewhere, where nothing ever moved."""
    rows = torch.zeros(ROWS, 12, dtype=torch.float64)
    rows[:, 0] = -1
    rows[:, 11] = 0.1 * torch.rand(ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stratum = [3, 20, 40, 60, 80]
    for i, row in enumerate(stratum):
        rows[row, 1 + i], rows[row, 11] = -7 * (1 + i % 2), 5 + i

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.zeros(11, dtype=torch.float64))

    def loss(model, batch):
        return batch[:, :11] @ model.x + batch[:, 11]

    moves = {}
    for with_them in (True, False):
        batches = crowded(Rows(rows), [3, 3, 3, 20])
        model = Wide()
        task = Task(model, SampleSet("s", [], loss), SampleSet("f", batches, loss), ["x"])
        layout = layout_of(model, ["x"])
        training = TrainingConfig(optimizer=optimizer, learning_rate=0.01, max_grad_norm=None)
        with measuring(model, layout):
            run = PlannedRun(task, layout, recipe_of(training, 400))
            rare = RareRows(run, batches)
            assert sorted(rare.rows) == stratum
            leaper = Leaper(run, rare=rare if with_them else None)
            block = leaper.real(0, 20, 5)
            if with_them:
                assert block.rare_share > rare.share
                run.stream.without = leaper.left_out
                block = replace(block, count=0)  # No real steps after the leap to make up for.
            before = model.x.detach().clone()
            leaper.leap(block, 20, 100)
            moves[with_them] = model.x.detach() - before
    correction = (moves[True] - moves[False]).abs()
    assert bool((correction <= moves[False].abs() * (1 + 1e-9)).all())
    assert correction.max() > 0


def test_a_killed_rollout_goes_on_with_the_same_rare_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(run_state, "SAVE_SHARE", 0.0)
    rows = linear_rows()
    rows[:3, 1], rows[:3, 3] = -3, 4
    settings = {
        "config": RolloutConfig(),
        "training": TrainingConfig(optimizer="adamw", learning_rate=0.01, max_grad_norm=None),
        "steps": 300,
    }
    whole = rollout(linear_task(Rows(rows)), **settings)
    real = run_state.save_state

    def stop(workspace, planned_run, track, block):
        real(workspace, planned_run, track, block)
        if track.steps[-1] > 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_state, "save_state", stop)
    with pytest.raises(KeyboardInterrupt):
        rollout(linear_task(Rows(rows)), **settings, workspace=tmp_path)
    monkeypatch.setattr(run_state, "save_state", real)
    resumed = rollout(linear_task(Rows(rows)), **settings, workspace=tmp_path)
    assert torch.equal(resumed.safety, whole.safety)
    assert resumed.gradient_evaluations == whole.gradient_evaluations


def test_without_that_a_leap_misses_or_multiplies_them():
    training = TrainingConfig(optimizer="sgd", learning_rate=0.01, max_grad_norm=None)
    errors = []
    for seed in range(5):
        batches = Rows(linear_rows(), seed)
        config = RolloutConfig(rare_rows=False)
        made = rollout(linear_task(batches), config=config, training=training, steps=1000)
        moved = made.safety[1, -1] - made.safety[1, made.steps.index(made.pilot_steps)]
        expected = -batches.rows[:, 1].mean() * 0.01 * (1000 - made.pilot_steps)
        errors.append(abs(float(moved / expected) - 1))
    assert max(errors) > 0.2


def test_the_stratum_and_what_a_block_saw():
    batches = Rows(linear_rows())
    task = linear_task(batches)
    layout = layout_of(task.model, ["x"])
    with measuring(task.model, layout):
        run = PlannedRun(
            task,
            layout,
            recipe_of(TrainingConfig(learning_rate=1.0, optimizer="sgd", max_grad_norm=None), 400),
        )
        rare = RareRows(run, batches)
        assert sorted(rare.rows) == sorted(RARE)
        assert rare.share == len(RARE) / ROWS
        for first, last in ((1, 5), (6, 30)):
            seen = [i for n in range(first - 1, last) for i in batches.indices(n)]
            assert rare.share_seen(first, last) == sum(i in RARE for i in seen) / len(seen)
        number = next(n for n in range(100) if RARE[0] in batches.indices(n))
        run.stream.without = rare.members
        assert float(run.stream.at(number)[:, 1].min()) == 0
        assert len(run.stream.at(number)) < SIZE


def test_clipping_limits_what_a_rare_row_can_pull():
    batches = Rows(linear_rows())
    task = linear_task(batches)
    layout = layout_of(task.model, ["x"])
    with measuring(task.model, layout):
        run = PlannedRun(
            task,
            layout,
            recipe_of(TrainingConfig(learning_rate=1.0, optimizer="sgd", max_grad_norm=0.5), 400),
        )
        rare = RareRows(run, batches)
        mean, pull = [torch.tensor([-1.0, 0, 0])], [torch.tensor([-1.0, -7, 0])]
        expected = 0.5 / math.hypot(1.0, 7 / SIZE)
        assert rare.kept_by_clipping(mean, pull) == pytest.approx(expected)


def test_data_without_known_rows_or_losses_is_left_alone():
    class Unknown:
        def __getitem__(self, number):
            return linear_rows()[number % ROWS : number % ROWS + SIZE]

        def __len__(self):
            return 50

    assert not isinstance(Unknown(), RowBatches)
    training = TrainingConfig(optimizer="sgd", learning_rate=0.01, max_grad_norm=None)
    assert rollout(linear_task(Unknown()), config=RolloutConfig(), training=training, steps=100).steps
    even = linear_rows()
    even[:, 1], even[:, 3] = 0, 1
    settings = {"training": training, "steps": 200}
    with_them = rollout(linear_task(Rows(even)), config=RolloutConfig(), **settings)
    without = rollout(linear_task(Rows(even)), config=RolloutConfig(rare_rows=False), **settings)
    assert torch.equal(with_them.safety, without.safety)
    assert with_them.gradient_evaluations == without.gradient_evaluations


def harmful(share, count=200):
    """Rows of a linear loss; that share of them pull seven times as hard, along their own coordinate."""
    rows = torch.zeros(count, 4, dtype=torch.float64)
    rows[:, 0] = -1
    rows[:, 3] = 0.1 * torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[: round(share * count), 1], rows[: round(share * count), 3] = -7, 5
    return rows


@pytest.mark.parametrize(
    ("share", "error"), [(0.04, 1e-9), (0.05, 1e-9), (0.055, 0.12), (0.06, 0.12), (0.08, 0.2), (0.1, 0.15)]
)
def test_no_cliff_where_harmful_rows_are_no_longer_rare(share, error):
    """Root mean square over six orders of the relative error of the move along the harmful coordinate."""
    rate, steps, errors = 0.01, 1000, []
    rows = harmful(share)
    for seed in range(6):
        training = TrainingConfig(optimizer="sgd", learning_rate=rate, max_grad_norm=None)
        made = rollout(linear_task(Rows(rows, seed)), config=RolloutConfig(), training=training, steps=steps)
        moved = made.safety[1, -1] - made.safety[1, made.steps.index(made.pilot_steps)]
        errors.append(float(moved / (-rows[:, 1].mean() * rate * (steps - made.pilot_steps))) - 1)
    assert math.sqrt(sum(e**2 for e in errors) / len(errors)) <= error


@pytest.mark.parametrize("share", [0.02, 0.05, 0.055, 0.1, 0.3])
def test_the_stratum_takes_a_twentieth_at_most(share):
    rows = harmful(share)
    rows[:, 3] += torch.arange(200) * 1e-4
    batches = Rows(rows)
    task = linear_task(batches)
    layout = layout_of(task.model, ["x"])
    with measuring(task.model, layout):
        training = TrainingConfig(learning_rate=1.0, optimizer="sgd", max_grad_norm=None)
        run = PlannedRun(task, layout, recipe_of(training, 400))
        rare = RareRows(run, batches)
    assert rare.share == min(share, 0.05)
    assert len(rare.members) == len(rare.rows) == round(200 * rare.share)
    assert max(rare.members) < round(share * 200)
    # An even pick over the losses: about as many from the lower half as from the upper.
    lower = sum(row < share * 100 for row in rare.rows)
    assert abs(lower - len(rare.rows) / 2) <= 1
