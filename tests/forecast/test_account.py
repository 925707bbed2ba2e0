"""Who carries the change of safety: parts that add up, rows as a dense gradient has them, no trace left."""

from dataclasses import replace

import pytest
import torch

from arisk.base.artifacts import read_record, write_record
from arisk.config.plan import RolloutConfig, TrainingConfig
from arisk.forecast.account import account, looked_at
from arisk.forecast.record import RolloutResult
from arisk.forecast.rollout import rollout
from arisk.forecast.rollout_page import account_findings, account_section
from arisk.gradients import layout_of, measuring
from arisk.training.loop import PlannedRun, keeping_parameters
from arisk.training.panels import panel_of
from arisk.training.recipe import recipe_of
from tests.forecast.test_rollout import classify, task_of

STEPS = 12


def taken(task, **options):
    """The account after real steps, and all that a test needs to make it again by hand."""
    layout = layout_of(task.model, task.parameter_names)
    recipe = recipe_of(TrainingConfig(max_steps=STEPS, **options), STEPS)
    with measuring(task.model, layout), keeping_parameters(task.model, layout) as start:
        run = PlannedRun(task, layout, recipe)
        for number in range(1, STEPS + 1):
            run.step(number)
        end = [p.detach().clone() for p in run.parameters]
        panel = panel_of(task.safety, None, torch.device("cpu"))
        found = account(run, layout, start, panel, 0.0)
        assert all(torch.equal(p, e) for p, e in zip(run.parameters, end, strict=True))
        assert all(p.grad is None for p in run.parameters)
        return found, run, list(start), end


def safety_loss(task, values):
    """Mean safety loss at given parameters, by functional call."""
    names = [name for name, _ in task.model.named_parameters()]
    at = dict(zip(names, values, strict=True))

    def model(x):
        return torch.func.functional_call(task.model, at, (x,))

    return torch.cat([classify(model, batch) for batch in task.safety.batches]).mean()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_parts_add_up_to_the_change(optimizer):
    task = task_of()
    found, _, start, end = taken(task, optimizer=optimizer, learning_rate=0.02)
    change = float(safety_loss(task, end) - safety_loss(task, start))
    assert found is not None
    assert abs(change) > 1e-3
    assert sum(found.parts) == pytest.approx(change, rel=5e-3)
    assert found.modules == ["0", "2"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rows_are_products_with_their_own_gradients(optimizer):
    task = task_of()
    found, run, start, end = taken(task, optimizer=optimizer, learning_rate=0.02)
    middle = [((a + b) / 2).requires_grad_() for a, b in zip(start, end, strict=True)]
    nodes = [
        [torch.lerp(a, b, t).requires_grad_() for a, b in zip(start, end, strict=True)]
        for t in ((1 - 3**-0.5) / 2, (1 + 3**-0.5) / 2)
    ]
    pulls = [torch.autograd.grad(safety_loss(task, node), node) for node in nodes]
    pull = [(a + b) / 2 for a, b in zip(*pulls, strict=True)]
    names = [name for name, _ in task.model.named_parameters()]
    scales = []
    for parameter in run.parameters:
        part, group = run.part_of(parameter)
        state = part.optimizer.state[parameter]
        second = state.get("exp_avg_sq")
        if second is None:
            scales.append(torch.ones_like(parameter))
        else:
            scales.append(1 / ((second / (1 - group["betas"][1] ** STEPS)).sqrt() + group["eps"]))
    batches = task.finetune.batches
    rows = [(x[i : i + 1], y[i : i + 1]) for x, y in batches for i in range(len(x))]
    assert len(found.rows) == looked_at(STEPS * 8, len(rows))
    for row in found.rows:
        x, y = rows[row["index"]]
        logits = torch.func.functional_call(task.model, dict(zip(names, middle, strict=True)), (x,))
        loss = torch.nn.functional.cross_entropy(logits, y)
        gradient = torch.autograd.grad(loss, middle)
        product = sum((p * d * g).sum() for p, d, g in zip(pull, scales, gradient, strict=True))
        by_hand = -sum(run.rates) / (found.finetune_rows or len(found.rows)) * float(product)
        assert row["first_order"] == pytest.approx(by_hand, rel=2e-2, abs=1e-6)


def test_no_move_has_no_account():
    task = task_of()
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout), keeping_parameters(task.model, layout) as start:
        run = PlannedRun(task, layout, recipe_of(TrainingConfig(max_steps=2), 2))
        panel = panel_of(task.safety, None, torch.device("cpu"))
        assert account(run, layout, start, panel, 0.0) is None


@pytest.mark.parametrize(
    ("gradients", "rows", "wanted"), [(0, 5, 5), (0, 500, 8), (240, 500, 10), (1e6, 500, 64)]
)
def test_more_rows_where_the_rollout_is_longer(gradients, rows, wanted):
    assert looked_at(gradients, rows) == wanted


def test_a_rollout_keeps_it_and_its_file_gives_it_back(tmp_path):
    plan = TrainingConfig(learning_rate=0.02, max_steps=40)
    found = rollout(task_of(), config=RolloutConfig(), training=plan, steps=40)
    assert found.account is not None
    assert found.account.change == pytest.approx(float(found.safety[2::4, -1].mean()), rel=1e-9)
    write_record(tmp_path, found)
    assert read_record(tmp_path, RolloutResult).account == found.account


def test_a_run_that_diverges_has_none():
    calls = []

    def breaks(model, batch):
        calls.append(1)
        return classify(model, batch) + (torch.nan if len(calls) > 3 else 0.0)

    task = task_of()
    diverging = replace(task, finetune=replace(task.finetune, loss_fn=breaks))
    found = rollout(diverging, config=RolloutConfig(), training=TrainingConfig(max_steps=30), steps=30)
    assert found.diverged_at is not None
    assert found.account is None


def test_the_page_names_rows_and_hides_their_texts():
    plan = TrainingConfig(learning_rate=0.02, max_steps=40)
    found = rollout(task_of(), config=RolloutConfig(), training=plan, steps=40).account
    assert found is not None
    rows = [{**row, "prompt": "how <b>", "response": "so", "line": 7 + row["index"]} for row in found.rows]
    shown = replace(found, rows=rows)
    page = account_section(shown, True, 10)
    assert "how &lt;b&gt;" in page
    assert "how &lt;b&gt;" not in account_section(shown, False, 10)
    assert f"{len(rows)} fine-tuning rows" in page
    assert {topic for topic, _, _ in account_findings(shown)} == {"Training rows", "Harm enters"}
