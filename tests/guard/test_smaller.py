"""A smaller plan is that plan; its share is read off the plain run; replay goes to the rows at risk."""

import dataclasses
from itertools import islice

import pytest
import torch

from arisk.base.errors import ConfigError, ShapeError
from arisk.base.task import SampleSet
from arisk.config.plan import TrainingConfig
from arisk.config.sections import BehaviourConfig, GuardSettings
from arisk.gradients import layout_of, measuring
from arisk.guard.plan import ArmPlan
from arisk.guard.run import guard
from arisk.guard.smaller import (
    SHARES,
    loss_rises,
    rises_under_first_steps,
    rows_at_risk,
    share_left,
    smaller_share,
)
from arisk.models.batching import FixedBatches
from arisk.training.recipe import recipe_of
from tests.guard.test_record import arm
from tests.guard.test_run import RECIPE, STEPS, classify, data, run, task_of


def plan(steps=100, **changes):
    task = task_of()
    recipe = recipe_of(TrainingConfig().model_copy(update={**RECIPE, **changes}), steps)
    layout = layout_of(task.model, task.parameter_names)
    return ArmPlan(task, layout, recipe, GuardSettings(), BehaviourConfig(), steps, frozenset(), 3)


@pytest.mark.parametrize("kind", ["rate", "steps"])
@pytest.mark.parametrize(("power", "share"), [(1, 0.5), (2, 0.65), (4, 0.8), (0.5, 0.25)])
def test_the_share_is_read_off_the_plain_run_by_flow_time(kind, power, share):
    """ΔL = τ^p of a constant rate: half is left at 2^(−1/p), of which the next share below is taken."""
    steps = list(range(0, 101, 5))
    rise = [(step / 100) ** power for step in steps]
    curve = dataclasses.replace(arm("plain"), steps=steps, safety=rise)
    assert share_left(dataclasses.replace(plan(), plain=curve), kind) == share


def test_the_share_is_read_off_a_watched_run_as_well():
    training = TrainingConfig().model_copy(update=RECIPE)
    history = [(step, step / 100) for step in range(10, 101, 10)]
    assert smaller_share(history, training, 100) == smaller_share(history, training, 100, "steps") == 0.5
    assert smaller_share([(100, -0.1)], training, 100) == 0.5


def test_a_watched_run_that_ended_early_is_not_taken_for_the_whole():
    training = TrainingConfig().model_copy(update=RECIPE)
    for history in ([(10, 0.05), (20, 0.2)], [], [(200, 0.2)]):
        with pytest.raises(ConfigError, match="the run has 100 optimizer steps") as caught:
            smaller_share(history, training, 100)
        assert "without a threshold" in caught.value.fix


def test_without_a_curve_it_is_half_and_where_nothing_helps_the_smallest():
    assert share_left(plan(), "rate") == 0.5
    flat = dataclasses.replace(arm("plain"), steps=[0, 1, 100], safety=[0.0, 1.0, 1.0])
    assert share_left(dataclasses.replace(plan(), plain=flat), "rate") == SHARES[-1]


def test_a_smaller_rate_is_a_run_at_that_rate_and_fewer_steps_a_shorter_plan():
    found = run(methods=["smaller"], smaller={"share": 0.5})
    slow = run(methods=["plain"], training={**RECIPE, "learning_rate": 0.01}).plain
    assert found.arms[1].final_safety == slow.final_safety
    short = guard(
        task_of(),
        config=GuardSettings(methods=["plain"]),
        training=TrainingConfig().model_copy(update=RECIPE),
        steps=STEPS // 2,
        seed=3,
    ).plain
    assert found.arms[2].final_safety == short.final_safety
    assert found.arms[2].steps[-1] == STEPS // 2
    assert dict(found.arms[2].weights) == {"steps": STEPS // 2}


def test_rows_whose_loss_rises_most_are_replayed():
    class Numbers(FixedBatches):
        def of(self, rows):
            return torch.tensor(rows)

    samples = SampleSet("safety", Numbers([None] * 8, 4, 0), classify, [{"line": i} for i in range(8)])
    rises = torch.tensor([0.0, 5.0, float("nan"), 1.0, 9.0, 2.0, -3.0, 4.0])
    chosen = rows_at_risk(samples, rises, 0.5, 3)
    assert [batch.tolist() for batch in chosen.batches] == [[1, 4, 5], [7]]
    assert [row["line"] for row in chosen.rows] == [1, 4, 5, 7]


def test_batches_that_cannot_be_regrouped_are_taken_whole():
    samples = SampleSet("safety", data(1, 4), classify)
    rises = torch.tensor([0.0] * 4 + [1.0] * 4 + [0.5] * 4 + [3.0, 0, 0, 0.0])
    chosen = rows_at_risk(samples, rises, 0.5, 8)
    wanted = list(samples.batches)
    assert [torch.equal(batch[0], wanted[i][0]) for batch, i in zip(chosen.batches, (1, 3), strict=True)] == [
        True
    ] * 2


def test_a_batch_counts_by_its_rows_whose_rise_is_known():
    samples = SampleSet("safety", data(1, 3), classify)
    unknown = float("nan")
    rises = torch.tensor([1.0] * 4 + [unknown, 3.0, unknown, 3.0] + [unknown] * 4)
    order = [list(samples.batches)[i][0] for i in (1, 0, 2)]
    for share, count in ((0.1, 1), (0.6, 2)):
        found = [batch[0] for batch in rows_at_risk(samples, rises, share).batches]
        assert {id(x) for x in found} == {id(x) for x in order[:count]}


@pytest.mark.parametrize("regrouped", [True, False])
@pytest.mark.parametrize("count", [7, 9])
def test_rises_of_other_rows_are_refused(regrouped, count):
    batches = FixedBatches([None] * 8, 4, 0) if regrouped else data(1, 2)
    with pytest.raises(ShapeError, match=rf"shape \({count},\), and there are 8 rows"):
        rows_at_risk(SampleSet("safety", batches, classify), torch.zeros(count))


def test_rises_are_those_of_the_first_plain_steps():
    made = plan(STEPS)
    with measuring(made.task.model, made.layout):
        found = rises_under_first_steps(made, 5)
        assert all(p.grad is not None for p in made.task.model.parameters())
        again = rises_under_first_steps(made, 5)
    assert torch.equal(found, again)
    safety = dataclasses.replace(made.task, heldout=None)
    plain = run(safety, methods=["plain"], steps=5).plain
    assert found.tolist() == pytest.approx(plain.final_safety, rel=1e-12)


def test_rises_of_a_loop_of_ones_own_are_those_of_its_end_and_the_model_is_put_back():
    task = task_of()
    model, samples = task.model, task.safety
    before = [p.detach().clone() for p in model.parameters()]
    ends = []

    def losses():
        with torch.no_grad():
            return torch.cat([classify(model, batch) for batch in samples.batches])

    def train():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in islice(iter(task.finetune.batches), 2):
            optimizer.zero_grad()
            classify(model, batch).mean().backward()
            optimizer.step()
        torch.rand(1)
        ends.append(losses())

    start, state = losses(), torch.get_rng_state()
    assert torch.equal(loss_rises(model, samples, train), ends[0] - start)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert torch.equal(state, torch.get_rng_state())


def test_the_arm_says_which_rows_it_replays():
    found = run(methods=["drift_replay"]).arms[1]
    assert "4 of 12 safety rows whose loss rises most under the first plain steps" in found.note
