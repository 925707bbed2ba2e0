"""Arms that hold to the aligned model, against plain loops of torch; what they need, and what they say."""

import dataclasses

import pytest
import torch

from arisk.base.errors import ConfigError, InputError
from arisk.config.plan import Config
from arisk.config.sections import BehaviourConfig
from arisk.gradients import layout_of, measuring
from arisk.guard import references
from arisk.guard.arm import ArmRun
from arisk.guard.methods import METHODS, arm_names
from arisk.guard.plan import ArmName, ArmPlan
from arisk.guard.record import NEVER_BEGUN
from arisk.guard.run import guard
from arisk.models import load_task
from arisk.models.anchored import ReferenceLosses, constrained, kl_to_reference
from arisk.models.answers import own_refusals
from arisk.models.losses import per_sample_nll, response_logits, trained_sums, trained_tokens
from tests.guard import test_run
from tests.guard.test_pipeline import FIXTURES

STEPS = 4


def config_of(**sections):
    data = {
        name: {"path": str(FIXTURES / "data" / f"{file}.jsonl"), "max_samples": rows}
        for name, file, rows in (
            ("safety", "safety", 12),
            ("finetune", "risky", 20),
            ("control", "control", 8),
        )
    }
    base = {
        "model": {"path": str(FIXTURES / "tiny-aligned"), "adapter": {"r": 4, "alpha": 8}},
        "training": {
            "batch_size": 4,
            "learning_rate": 2e-3,
            "max_steps": STEPS,
            "max_grad_norm": None,
            "schedule": "linear",
            "weight_decay": 0.0,
        },
        "guard": {"generate": 0, "task_samples": 4, "control_samples": 4},
    }
    return Config.model_validate({**base, **data, **sections})


def carried_out(config, task=None, **methods):
    task = task or load_task(config, device=torch.device("cpu"))
    settings = config.guard.model_copy(update=methods)
    return guard(task, config=settings, training=config.training, steps=STEPS, behaviour=config.behaviour)


def by_hand(task, loss, steps=STEPS):
    """Torch's AdamW on the planned batches; the rise of every safety row's loss."""
    model = task.model
    trained = [p for name, p in model.named_parameters() if name in set(task.parameter_names)]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0.0)
    start = torch.cat([per_sample_nll(model, b) for b in task.safety.batches]).detach()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - (step - 1) / steps)
        optimizer.zero_grad()
        loss(model, task.finetune.batches[step - 1], step).backward()
        optimizer.step()
    return (torch.cat([per_sample_nll(model, b) for b in task.safety.batches]).detach() - start).tolist()


def test_constrained_first_tokens_is_a_loop_with_that_loss():
    config = config_of()
    arm = carried_out(config, methods=["plain", "constrained"]).arms[1]
    task = load_task(config, device=torch.device("cpu"))
    reference = ReferenceLosses()
    for step in range(STEPS):
        reference.add(task.model, task.finetune.batches[step])
    tied = constrained(reference)

    def loss(model, batch, step):
        del step
        return tied.sums(model, batch).sum() / trained_tokens(batch).sum()

    assert arm.final_safety == pytest.approx(by_hand(task, loss), rel=1e-3, abs=1e-5)
    assert arm.diverged_at is None


def test_the_divergence_is_added_to_the_task():
    config = config_of()
    arm = carried_out(config, methods=["plain", "kl"]).arms[1]
    task = load_task(config, device=torch.device("cpu"))
    model, batches = task.model, []
    for batch in task.safety.batches:
        with torch.no_grad():
            batches.append((batch, response_logits(model, batch)[0]))

    def loss(model, batch, step):
        epoch, place = divmod(step - 1, len(batches))
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch))
        own, then = batches[int(order[place])]
        now, where = response_logits(model, own)
        each = kl_to_reference(now, then)
        rows = where.nonzero()[:, 0]
        means = torch.stack([each[rows == row].mean() for row in range(len(where))])
        return trained_sums(model, batch).sum() / trained_tokens(batch).sum() + means.mean()

    assert arm.final_safety == pytest.approx(by_hand(task, loss), rel=1e-3, abs=1e-5)
    assert arm.terms["divergence"][-1] > 0


@pytest.mark.parametrize(("precision", "narrow"), [("bf16", True), ("weights", False)])
def test_safety_rows_are_read_in_the_precision_of_the_plan(precision, narrow, monkeypatch):
    """As where a term is added to the loss of a trainer under autocast."""
    config = config_of(training={**config_of().training.model_dump(), "precision": precision})
    task, seen = load_task(config, device=torch.device("cpu")), []

    def noted(loss):
        def wrapped(*given):
            seen.append(torch.is_autocast_enabled("cpu"))
            return loss(*given)

        return wrapped

    monkeypatch.setattr(references, "kl_to_aligned", noted(references.kl_to_aligned))
    assert carried_out(config, task, methods=["plain", "kl"]).arms[1].diverged_at is None
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout):
        safety = dataclasses.replace(task.safety, loss_fn=noted(per_sample_nll))
        plan = ArmPlan.of(
            dataclasses.replace(task, safety=safety),
            layout,
            config=config.guard,
            training=config.training,
            steps=STEPS,
            seed=0,
            behaviour=None,
        )
        for method, strength, kind in (("replay", 0.1, "loss"), ("projection", None, "conflict")):
            run, name = plan.fresh(), ArmName(method, method, strength, kind)
            run.protect = METHODS[method].build(plan, name).protect
            run.step(1)
    # Two strengths of kl, and a step each of the others.
    assert seen == [narrow] * (2 * STEPS + 2)


def test_own_refusals_are_the_models_greedy_words_and_the_judge_chooses_them():
    task = load_task(config_of(), device=torch.device("cpu"))
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout):
        own = own_refusals(task.model, task.safety, BehaviourConfig(), prompts=6, max_new_tokens=12)
        said = {
            row["prompt"]: task.safety.generate(task.model, [i], 12)[0]
            for i, row in enumerate(task.safety.rows)
        }
    assert 0 < len(own.rows) <= own.statistics["asked"] == 6
    for row in own.rows:
        assert row["response"] == said[row["prompt"]]
    with torch.no_grad():
        losses = torch.cat([per_sample_nll(task.model, batch) for batch in own.batches])
    # What it says itself is likely to it.
    assert float(losses.mean()) < 0.5
    arm = carried_out(config_of(), methods=["plain", "own_replay"]).arms[1]
    assert arm.diverged_at is None
    assert "own refusals of" in arm.note


def test_where_the_judge_rejects_all_own_refusals_one_error_says_so():
    class Complies:
        def generate(self, **given):
            ids = given["input_ids"]
            return torch.cat([ids, torch.full((len(ids), 3), 7)], 1)

    task = load_task(config_of(), device=torch.device("cpu"))
    task.model.generate = Complies().generate
    with pytest.raises(InputError, match="the judge takes none of the model's 6 own answers") as caught:
        own_refusals(task.model, task.safety, BehaviourConfig(), prompts=6, where="guard.methods: own_replay")
    assert caught.value.where == "guard.methods: own_replay"
    assert "refusal_openings" in caught.value.fix


def test_rows_without_prompts_give_no_own_refusals():
    job = test_run.task_of()
    with pytest.raises(InputError, match="no prompts"):
        own_refusals(job.model, job.safety)


def test_who_names_own_replay_is_told_before_anything_is_trained(monkeypatch):
    def none(*args, **kwargs):
        raise InputError("none of the answers is a refusal", where="guard", fix="other prompts")

    monkeypatch.setattr(references, "own_refusals", none)
    monkeypatch.setattr(ArmRun, "carry_out", lambda *args: pytest.fail("an arm was trained"))
    with pytest.raises(InputError, match="none of the answers"):
        carried_out(config_of(), methods=["plain", "own_replay"])


@pytest.mark.parametrize("method", ["constrained", "kl", "own_replay"])
def test_a_model_from_python_is_told_what_is_missing(method):
    with pytest.raises(ConfigError, match=f"{method} cannot be used here"):
        test_run.run(methods=[method])
    assert METHODS[method].unfit(test_run.task_of())


def test_an_arm_whose_loss_is_not_a_number_is_named_and_the_others_go_on(monkeypatch):
    """A reference of NaN: the constrained loss is NaN from the first step on."""
    of = ReferenceLosses.of
    monkeypatch.setattr(ReferenceLosses, "of", lambda self, batch: of(self, batch) * float("nan"))
    found = carried_out(config_of(), methods=["plain", "constrained", "replay"])
    ended = {arm.method: arm.diverged_at for arm in found.arms}
    assert ended["constrained"] == 1
    assert ended["replay"] is None
    assert ended["plain"] not in (1, NEVER_BEGUN)
    bad = next(arm for arm in found.arms if arm.method == "constrained")
    assert "loss is nan at step 1" in bad.reason


def test_labels_name_the_strength():
    config = test_run.GuardConfig(methods=["constrained", "kl", "own_replay"])
    assert [arm.label for arm in arm_names(config)] == [
        "plain",
        "constrained 1",
        "kl 1",
        "kl 2",
        "own_replay 0.3",
    ]
