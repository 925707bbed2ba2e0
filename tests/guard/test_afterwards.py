"""Arms that cost no training: running means and the α-curve, against the weights of a plain loop of torch."""

import pytest
import torch
from torch import nn

from arisk.config.plan import TrainingConfig, VerifyConfig
from arisk.guard.afterwards import Averages, between
from arisk.training import state as run_state
from arisk.verification.run import verify
from tests.guard.test_run import RECIPE, STEPS, classify, net, run, task_of, timeless
from tests.plain_loop import decay_groups


def path():
    """The plain run's parameters after every step, the start first."""
    model, task = net(), task_of()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=0.02)
    found = [[p.detach().clone() for p in model.parameters()]]
    for step in range(STEPS):
        optimizer.zero_grad()
        classify(model, task.finetune.batches[step % 5]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append([p.detach().clone() for p in model.parameters()])
    return found


def rises(weights):
    """The rise of every held-out row's loss at these weights."""
    model, batches = net(), list(task_of().heldout.batches)
    before = torch.cat([classify(model, batch) for batch in batches]).detach()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), weights, strict=True):
            parameter.copy_(value)
    return (torch.cat([classify(model, batch) for batch in batches]).detach() - before).tolist()


def test_the_alpha_curve_is_measured_on_the_way_between_start_and_end():
    found = run(methods=["alpha"], alpha={"values": [0.25, 0.5]})
    first, *_, last = path()
    for arm, alpha in zip(found.arms[1:], (0.25, 0.5), strict=True):
        weights = [(1 - alpha) * a + alpha * b for a, b in zip(first, last, strict=True)]
        assert arm.final_safety == pytest.approx(rises(weights), rel=1e-9, abs=1e-12)
        assert (list(arm.steps), arm.safety[0]) == ([0, STEPS], 0.0)
        assert arm.cpu_seconds == found.plain.cpu_seconds
    assert found.plain.final_safety == pytest.approx(rises(last), rel=1e-9, abs=1e-12)


def test_the_average_is_the_running_mean_from_the_aligned_model_on():
    arm = run(methods=["average"], average={"shares": [0.25]}).arms[1]
    first, *rest = path()
    mean = first
    for weights in rest:
        mean = [m + (w - m) / (0.25 * STEPS) for m, w in zip(mean, weights, strict=True)]
    assert arm.final_safety == pytest.approx(rises(mean), rel=1e-9, abs=1e-12)


def test_a_mean_over_less_than_a_step_is_the_run_itself():
    parameter = torch.tensor([1.0, 2.0], dtype=torch.float64)
    averages = Averages([parameter], [0.01], 10)
    parameter.mul_(3)
    averages()
    assert torch.equal(averages.means[0.01][0], parameter)


def test_between_has_both_ends():
    start, end = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert torch.equal(between([start], [end], 0.0)[0], start)
    assert torch.allclose(between([start], [end], 1.0)[0], end, rtol=1e-15)


def test_interrupted_the_means_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(run_state, "SAVE_SHARE", 0.0)
    settings = {"methods": ["average", "alpha"]}
    want = timeless(run(**settings))
    save, killing = run_state.save_state, [7]

    def killed(*args):
        save(*args)
        killing[0] -= 1
        if killing[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_state, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(workspace=tmp_path, **settings)
    assert timeless(run(workspace=tmp_path, **settings)) == want
    # A third run finds all of them finished.
    assert timeless(run(workspace=tmp_path, **settings)) == want


def test_a_run_of_verify_has_no_weights_left_to_read_arms_off():
    task, training = task_of(), TrainingConfig().model_copy(update=RECIPE)
    measured = verify(task, config=VerifyConfig(), training=training, steps=STEPS, seed=3, task_samples=64)
    found = run(task, measured=measured, methods=["alpha"])
    at = [list(measured.steps).index(step) for step in found.plain.steps]
    assert found.plain.safety == measured.safety.mean(0)[at].tolist()
    assert len(found.arms) == 4
