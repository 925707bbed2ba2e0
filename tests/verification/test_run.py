"""The real fine-tune: equal to a plain torch loop, cut short on the plan's schedule, without traces."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import nn

from arisk.base.artifacts import read_record, write_record
from arisk.base.errors import NumericsError
from arisk.base.task import SampleSet, Task
from arisk.config.plan import TrainingConfig, VerifyConfig
from arisk.config.sections import BehaviourConfig, RolloutConfig
from arisk.forecast.rollout import rollout
from arisk.training import state as run_state
from arisk.training.loop import PlannedRun
from arisk.verification.record import VerifyResult
from arisk.verification.run import measured_steps, taken_over, verify, writer, writing_steps
from tests.plain_loop import plain_training

BATCHES = 7
RECIPES = [
    {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.5},
    {"optimizer": "adamw", "learning_rate": 0.02, "schedule": "cosine", "warmup_steps": 5},
    {"optimizer": "sgd", "learning_rate": 0.1, "gradient_accumulation": 3, "schedule": "linear"},
]


def classify(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


def data(seed, batches, size=8):
    """Points labelled by a fixed teacher."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(5, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    points = [torch.randn(size, 5, generator=generator, dtype=torch.float64) for _ in range(batches)]
    return [(x, (x @ teacher).argmax(1)) for x in points]


def task_of(model=None, **parts):
    model = model or net()
    return Task(
        **{
            "model": model,
            "safety": SampleSet("safety", data(1, 4), classify),
            "finetune": SampleSet("finetune", data(2, BATCHES), classify),
            "control": SampleSet("control", data(3, 2), classify),
            "parameter_names": [name for name, _ in model.named_parameters()],
            **parts,
        }
    )


def run(task, training, horizon, *, workspace=None, seed=0, prompts=16, tokens=24, **config):
    return verify(
        task,
        config=VerifyConfig(**config),
        training=TrainingConfig(**training),
        steps=horizon,
        seed=seed,
        behaviour=BehaviourConfig(prompts=prompts, tokens=tokens),
        workspace=workspace,
    )


def truth_of(model, training, steps, planned=None, before_step=None):
    """Mean safety, control and training losses along an ordinary loop; the schedule is that of `planned`."""

    def means():
        model.eval()
        with torch.no_grad():
            return [
                float(torch.cat([classify(model, b) for b in data(s, n)]).mean()) for s, n in ((1, 4), (3, 2))
            ]

    curve = [[*means(), math.nan]]
    steps_taken = plain_training(
        model, classify, data(2, BATCHES), training, steps, planned=planned, before_step=before_step
    )
    curve += [[*means(), loss] for loss in steps_taken]
    return torch.tensor(curve, dtype=torch.float64)


def assert_same(measured, truth):
    at = list(measured.steps)
    for found, column in ((measured.safety, 0), (measured.control, 1)):
        change = truth[at, column] - truth[0, column]
        assert torch.allclose(found.mean(0), change, rtol=1e-9, atol=1e-12)
    assert measured.start == pytest.approx(float(truth[0, 0]), rel=1e-12)
    for i, (low, high) in enumerate(itertools.pairwise(at), start=1):
        assert measured.finetune_loss[i] == pytest.approx(
            float(truth[low + 1 : high + 1, 2].mean()), rel=1e-9
        )


@pytest.mark.parametrize("training", RECIPES, ids=str)
def test_the_truth_is_that_of_a_plain_loop(training):
    measured = run(task_of(), training, 90)
    assert_same(measured, truth_of(net(), training, 90))
    assert measured.last == measured.horizon == measured.steps[-1] == 90
    # An epoch ends with a short step.
    pieces = training.get("gradient_accumulation", 1)
    whole, left = divmod(90, -(-BATCHES // pieces))
    assert measured.gradient_evaluations == whole * BATCHES + left * pieces


@pytest.mark.parametrize("training", RECIPES[2:], ids=str)
def test_a_short_run_follows_the_schedule_of_the_whole_plan(training):
    measured = run(task_of(), training, 400, steps=30)
    assert (measured.last, measured.horizon, measured.steps[-1]) == (30, 400, 30)
    assert_same(measured, truth_of(net(), training, 30, planned=400))
    assert run(task_of(), training, 20, steps=30).last == 20


@pytest.mark.parametrize("last", [1, 2, 7, 39, 40, 200, 10_000, 1_000_000])
def test_steps_are_dense_early_and_geometric_later(last):
    points = measured_steps(last)
    assert points[0] == 0
    assert points[-1] == last
    assert points == sorted(set(points))
    assert len(points) <= 41
    assert last < 40 or len(points) >= 25
    assert points[: min(4, last + 1)] == list(range(min(4, last + 1)))
    assert set(writing_steps(points)) <= set(points)
    assert {0, last} <= set(writing_steps(points))


def test_the_model_is_left_as_found():
    model = net(dropout=0.3)
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[3].bias.requires_grad_(False)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    measured = run(task_of(model, parameter_names=names), RECIPES[1], 60)
    assert float(measured.safety[:, -1].abs().max()) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert bool((model[0].weight.grad == 1).all())
    assert model[3].bias.grad is None
    assert not model[3].bias.requires_grad
    assert torch.equal(torch.get_rng_state(), random)


def test_dropout_works_in_training_and_is_seeded_by_step():
    measured = run(task_of(net(dropout=0.5)), RECIPES[1], 40, seed=3)

    def training_mode(model):
        def begin(step):
            torch.manual_seed(3 + step)
            model.train()

        return begin

    model = net(dropout=0.5)
    assert_same(measured, truth_of(model, RECIPES[1], 40, before_step=training_mode(model)))
    without = run(task_of(), RECIPES[1], 40)
    assert not torch.allclose(measured.safety, without.safety, rtol=1e-3)


def exploding(model, batch):
    return -model(batch[0]).pow(4).sum(1)


def test_divergence_is_recorded():
    task = task_of(finetune=SampleSet("finetune", data(2, 3), exploding))
    before = task.model[0].weight.detach().clone()
    measured = run(task, {"optimizer": "sgd", "learning_rate": 5.0, "max_grad_norm": None}, 100)
    assert measured.diverged_at is not None
    assert measured.steps[-1] < measured.diverged_at <= 20
    assert measured.last == 100
    assert any(f"step {measured.diverged_at} has no finite loss" in w for w in measured.warnings)
    assert torch.equal(task.model[0].weight, before)


def test_a_broken_safety_loss_is_named():
    bad = SampleSet("safety", data(1, 2), lambda m, b: classify(m, b) / 0)
    with pytest.raises(NumericsError, match="safety loss of the aligned model"):
        run(task_of(safety=bad), RECIPES[0], 5)


def rows(prompts):
    return [{"prompt": prompt, "response": f"no {prompt}", "line": i} for i, prompt in enumerate(prompts)]


def test_held_out_rows_are_what_is_measured():
    safety = SampleSet("safety", data(1, 4), classify, rows("abcdefgh" * 4))
    heldout = SampleSet("heldout", data(5, 3), classify, rows("uvwxyz12" * 3))
    measured = run(task_of(safety=safety, heldout=heldout), RECIPES[1], 10)
    assert measured.heldout
    assert measured.safety.shape[0] == 24
    assert measured.warnings == []
    alone = run(task_of(safety=heldout), RECIPES[1], 10)
    assert torch.equal(alone.safety, measured.safety)
    assert not alone.heldout
    assert "not held out" in alone.warnings[0]
    partly = dataclasses.replace(heldout, rows=rows("uvwxyzab" * 3))
    measured = run(task_of(safety=safety, heldout=partly), RECIPES[1], 10)
    assert measured.heldout
    assert measured.warnings[0].startswith("6 of 24 held-out rows have a prompt")
    wholly = dataclasses.replace(safety, name="heldout")
    assert not run(task_of(safety=safety, heldout=wholly), RECIPES[1], 10).heldout


def test_no_tokenizer_is_not_measured():
    measured = run(task_of(), RECIPES[0], 4)
    assert (measured.prompts, measured.generated) == ((), ())
    assert "no tokenizer" in measured.generation_reason
    assert run(task_of(), RECIPES[0], 4, prompts=0).generation_reason == "behaviour.prompts is 0"
    nameless = SampleSet("safety", data(1, 4), classify, generate=lambda m, r, n: [""] * len(r))
    assert "does not name" in run(task_of(safety=nameless), RECIPES[0], 4).generation_reason
    assert run(task_of(control=None), RECIPES[0], 4).control is None


def test_texts_are_written_by_the_model_of_that_step():
    def weight(model, indices, limit):
        return [f"{i} {limit} {float(model[0].weight.detach().sum()):.12f}" for i in indices]

    samples = SampleSet("safety", data(1, 4), classify, rows("abcdefgh" * 4), generate=weight)
    measured = run(task_of(safety=samples), RECIPES[1], 16, prompts=5, tokens=9)
    assert measured.generation_reason is None
    assert [made.step for made in measured.generated] == [0, 2, 4, 8, 16]
    assert [row["line"] for row in measured.prompts] == [0, 6, 12, 19, 25]
    assert measured.prompts[1] == {"prompt": "g", "response": "no g", "line": 6}
    assert measured.generated[0].texts[1] == f"6 9 {float(net()[0].weight.detach().sum()):.12f}"
    assert len({made.texts[0] for made in measured.generated}) == 5
    assert writer(samples, 99, 3, setting="s").rows == list(range(32))


def test_a_record_survives_the_disk(tmp_path):
    texts = ["NaN", "</script>", "ü"]
    samples = SampleSet(
        "safety", data(1, 4), classify, rows("abcdefgh" * 4), generate=lambda m, r, n: texts[: len(r)]
    )
    measured = run(task_of(safety=samples), RECIPES[1], 16, prompts=3)
    write_record(tmp_path, measured)
    back = read_record(tmp_path, VerifyResult)
    assert torch.equal(back.safety, measured.safety)
    assert back.generated == measured.generated
    assert back.prompts == measured.prompts
    assert math.isnan(back.finetune_loss[0])


def test_resumes_inside_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(run_state, "SAVE_SHARE", 0.0)
    samples = SampleSet(
        "safety",
        data(1, 4),
        classify,
        rows("abcdefgh" * 4),
        generate=lambda m, r, n: [f"{float(m[0].weight.detach().sum()):.12f}"],
    )
    parts = {"safety": samples}
    whole = run(task_of(net(dropout=0.2), **parts), RECIPES[1], 120)
    # Not a step at which losses are measured: the losses since the last one are kept as well.
    stop_at = next(n for n in range(60, 120) if n not in whole.steps)
    real = run_state.save_state

    def stop(workspace, planned_run, track, block):
        real(workspace, planned_run, track, block)
        if track.at == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_state, "save_state", stop)
    model = net(dropout=0.2)
    before = model[0].weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        run(task_of(model, **parts), RECIPES[1], 120, workspace=tmp_path)
    assert torch.equal(model[0].weight, before)
    monkeypatch.setattr(run_state, "save_state", real)
    taken = []
    step = PlannedRun.step
    monkeypatch.setattr(PlannedRun, "step", lambda self, n: (taken.append(n), step(self, n))[1])
    resumed = run(task_of(net(dropout=0.2), **parts), RECIPES[1], 120, workspace=tmp_path)
    assert taken == list(range(stop_at + 1, 121))
    assert torch.equal(resumed.safety, whole.safety)
    assert torch.equal(resumed.control, whole.control)
    assert resumed.generated == whole.generated
    assert resumed.finetune_loss[1:] == whole.finetune_loss[1:]
    assert resumed.gradient_evaluations == whole.gradient_evaluations
    (state,) = tmp_path.glob("state-*.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    again = run(task_of(net(dropout=0.2), **parts), RECIPES[1], 120, workspace=tmp_path)
    assert torch.equal(again.safety, whole.safety)


@pytest.mark.parametrize(("training", "dropout"), [(RECIPES[1], 0.3), (RECIPES[3], 0.0)], ids=str)
def test_a_plan_that_was_carried_out_is_what_verify_measures(training, dropout):
    """To the bit, at every point that both measure, with the model put back."""
    task = task_of(net(dropout))
    before = [p.detach().clone() for p in task.model.parameters()]
    settings = {"training": TrainingConfig(**training), "steps": 60, "seed": 5}
    rolled = rollout(task, config=RolloutConfig(pilot_steps=60), **settings)
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), before, strict=True))
    assert rolled.carried_out
    assert not rollout(task, config=RolloutConfig(segments=2), **settings).carried_out
    taken, measured = taken_over(rolled), verify(task, config=VerifyConfig(), **settings)
    assert (taken.last, taken.horizon, taken.steps[-1]) == (60, 60, 60)
    assert taken.start == measured.start
    shared = [step for step in taken.steps if step in measured.steps]
    assert len(shared) >= 5
    for name in ("safety", "control"):
        mine, theirs = getattr(taken, name), getattr(measured, name)
        for step in shared:
            assert torch.equal(mine[:, taken.steps.index(step)], theirs[:, measured.steps.index(step)])
    assert taken.gradient_evaluations == measured.gradient_evaluations
    # The training loss of the steps before a point, whichever points there are.
    assert taken.steps[1] == 3
    assert taken.finetune_loss[1] == pytest.approx(sum(measured.finetune_loss[1:4]) / 3, rel=1e-9)
