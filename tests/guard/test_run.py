"""Protected fine-tunes: the plain arm is verify's, each protection does what it says and leaves no trace."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import arisk
from arisk import PipelineConfig
from arisk.base.errors import ConfigError
from arisk.base.task import SampleSet, Task
from arisk.config.plan import GuardConfig, TrainingConfig, VerifyConfig
from arisk.guard.arm import ArmRun
from arisk.guard.choice import choose, ending
from arisk.guard.methods import arm_names
from arisk.guard.plan import measured_points
from arisk.guard.record import NEVER_BEGUN
from arisk.guard.run import guard
from arisk.guard.summary import guard_summary
from arisk.models.judge import RefusalRule
from arisk.training import state as run_state
from arisk.verification.run import measured_steps, verify
from tests.plain_loop import decay_groups

RECIPE = {"optimizer": "adamw", "learning_rate": 0.02, "weight_decay": 0.01, "max_grad_norm": 1.0}
LIMITS = {"threshold": 1e-9, "tolerated": 0.05, "wanted": 0.5}
STEPS = 12


def classify(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def net(dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


def data(seed, batches, size=4, flip=0):
    """Points labelled by a fixed teacher, or against it."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(5, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    points = [torch.randn(size, 5, generator=generator, dtype=torch.float64) for _ in range(batches)]
    return [(x, ((x @ teacher).argmax(1) + flip) % 3) for x in points]


def task_of(model=None, **parts):
    model = model or net()
    sets = {
        "safety": SampleSet("safety", data(1, 3), classify),
        "finetune": SampleSet("finetune", data(2, 5, flip=1), classify),
        "control": SampleSet("control", data(3, 2), classify),
        "heldout": SampleSet("heldout", data(4, 2), classify),
    }
    names = [name for name, _ in model.named_parameters()]
    return Task(**{"model": model, "parameter_names": names, **sets, **parts})


def read(config):
    """Sections of guard from plain values; strengths beyond the limits stay as they are."""
    defaults = GuardConfig()
    made = {
        k: getattr(defaults, k).model_copy(update=v) if isinstance(v, dict) else v for k, v in config.items()
    }
    if "methods" in made:
        made["methods"] = ["plain", *(name for name in made["methods"] if name != "plain")]
    return made


def run(task=None, *, workspace=None, measured=None, training=RECIPE, **config):
    return guard(
        task or task_of(),
        config=GuardConfig(calibration_steps=3).model_copy(update=read(config)),
        # Not validated again: some tests want numbers that no config may have.
        training=TrainingConfig().model_copy(update=training),
        steps=STEPS,
        seed=3,
        workspace=workspace,
        measured=measured,
    )


def timeless(result):
    """The record without clock times."""
    arms = [dataclasses.replace(arm, cpu_seconds=0.0, setup_seconds=0.0) for arm in result.arms]
    return repr(dataclasses.replace(result, arms=arms))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_plain_arm_is_the_run_that_verify_measures(dropout):
    task = task_of(net(dropout))
    plain = run(task, methods=["plain"]).plain
    truth = verify(task, config=VerifyConfig(), training=TrainingConfig(**RECIPE), steps=STEPS, seed=3)
    assert plain.steps == measured_points(STEPS)
    at = [list(truth.steps).index(step) for step in plain.steps]
    assert plain.safety == truth.safety.mean(0)[at].tolist()
    assert plain.control == pytest.approx(truth.control.mean(0)[at].tolist(), rel=1e-12, abs=1e-15)
    assert plain.final_safety == truth.safety[:, -1].tolist()


def test_every_method_runs_alters_the_run_and_leaves_no_trace():
    task = task_of()
    before = [p.detach().clone() for p in task.model.parameters()]
    state = torch.random.get_rng_state()
    found = run(task, projection={"kinds": ["conflict", "subspace"]})
    assert [told.partition(" ")[0] for told in found.warnings[-3:]] == ["constrained", "kl", "own_replay"]
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), before, strict=True))
    assert all(p.grad is None for p in task.model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())
    labels = [arm.label for arm in found.arms]
    assert labels == [
        *("plain", "alignguard as given", "alignguard 3", "alignguard after 1.5", "ewc 10"),
        *("ewc after 1.5", "projection conflict", "projection subspace", "replay 0.1", "replay 0.3"),
        *("drift_replay 0.3", "smaller rate", "smaller steps", "average 0.2", "average 0.5"),
        *("alpha 0.25", "alpha 0.5", "alpha 0.75"),
    ]
    for arm in found.arms[1:]:
        assert arm.diverged_at is None
        if arm.method not in ("smaller", "average", "alpha"):
            assert arm.steps == found.plain.steps
        assert arm.safety[-1] != found.plain.safety[-1]
        assert all(len(series) == len(arm.steps) for series in arm.terms.values())


def test_replay_is_a_loop_with_both_losses():
    """Torch's own AdamW on L + 0.5 L_safety, minibatches of all four rows of a batch."""
    arm = run(methods=["replay"], replay={"strengths": [0.5], "rows": 4}).arms[1]
    model, task = net(), task_of()
    batches = list(task.safety.batches)
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=0.02)
    heldout = list(task.heldout.batches)
    start = torch.cat([classify(model, b) for b in heldout]).detach()
    for step in range(1, STEPS + 1):
        epoch, place = divmod(step - 1, len(batches))
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(3 + epoch))
        optimizer.zero_grad()
        loss = classify(model, task.finetune.batches[(step - 1) % 5]).mean()
        (loss + 0.5 * classify(model, batches[int(order[place])]).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    end = torch.cat([classify(model, b) for b in heldout]).detach()
    assert arm.final_safety == pytest.approx((end - start).tolist(), rel=1e-9)


def test_calibration_gives_the_wanted_ratio_of_gradients():
    """λ makes the penalty's gradient c times the task's after three plain steps."""
    one, ten = (run(methods=["ewc"], ewc={"strengths": [c], "relaxations": []}).arms[1] for c in (1.0, 10.0))
    assert ten.weights["fisher"] == pytest.approx(10 * one.weights["fisher"])
    model, task = net(), task_of()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=0.02)
    start = [p.detach().clone() for p in model.parameters()]
    rows = []
    for x, y in task.safety.batches:
        for i in range(len(x)):
            model.zero_grad()
            classify(model, (x[i : i + 1], y[i : i + 1])).mean().backward()
            rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    fisher = torch.stack(rows).square().mean(0)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        classify(model, task.finetune.batches[step]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
        optimizer.step()
    drift = torch.cat([(p.detach() - q).flatten() for p, q in zip(model.parameters(), start, strict=True)])
    want = sum(norms) / 3 / float((2 * fisher * drift).norm())
    assert one.weights["fisher"] == pytest.approx(want, rel=1e-6)


def test_a_strong_penalty_keeps_the_model_where_it_is():
    """λ → ∞ of EWC: what the Fisher matrix sees does not move; replay lowers the safety loss."""
    found = run(
        methods=["alignguard", "replay"],
        alignguard={"strengths": [300.0], "relaxations": [2.0], "repeats": 8},
        replay={"strengths": [3.0]},
    )
    plain, strong, after, replay = found.arms
    assert strong.safety[-1] < 0.5 * plain.safety[-1]
    assert after.safety[-1] < 0.5 * plain.safety[-1]
    assert replay.safety[-1] < 0.5 * plain.safety[-1]
    assert choose(found, **LIMITS).rule in ("met", "none met")


def test_two_runs_are_equal_but_for_the_clock():
    assert timeless(run()) == timeless(run())


def test_interrupted_it_goes_on_inside_an_arm_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(run_state, "SAVE_SHARE", 0.0)
    settings = {"methods": ["replay", "ewc"]}
    want = timeless(run(**settings))
    save, turns, killing = run_state.save_state, [], [True]

    def killed(folder, planned, track, block):
        save(folder, planned, track, block)
        turns.append(track.at)
        if len(turns) == STEPS + 5 and killing:
            raise KeyboardInterrupt

    monkeypatch.setattr(run_state, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        run(workspace=tmp_path, **settings)
    assert (tmp_path / "arm-00" / "record.json").exists()
    assert (tmp_path / "arm-01" / "state.json").exists()
    assert not (tmp_path / "arm-00" / "state.json").exists()
    turns.clear()
    killing.clear()
    assert timeless(run(workspace=tmp_path, **settings)) == want
    assert turns[0] == 6


def test_a_plain_run_that_diverges_ends_the_comparison():
    found = run(training={"optimizer": "sgd", "learning_rate": 1.7e308})
    assert len(found.arms) == 1
    assert found.plain.diverged_at is not None
    assert choose(found, **LIMITS).rule == "plain diverged"
    assert "no other arm was run" in " ".join(found.warnings)


@pytest.mark.parametrize("diverging", [0, 1])
def test_a_plain_run_that_diverges_on_one_seed(monkeypatch, diverging):
    """On a further seed it is left out and said; on the plan's own nothing more is run."""
    carry_out = ArmRun.carry_out

    def ends(self, folder):
        done = carry_out(self, folder)
        gone = done.label == "plain" and self.repeat == diverging
        return dataclasses.replace(done, diverged_at=5, reason="nan") if gone else done

    monkeypatch.setattr(ArmRun, "carry_out", ends)
    found = run(methods=["replay"], seeds=3)
    assert [arm.seed for arm in found.repeats] == ([1, 2, 2, 2] if diverging else [])
    said = "diverged on 1 of 3 seeds (at step 5)" if diverging else "no other arm was run"
    assert said in " ".join(found.warnings)
    body = guard_summary(found, **LIMITS, judge=RefusalRule())
    assert (body["rule"] == "plain diverged") == (not diverging)
    assert "nan" not in body["sentence"]


def test_an_arm_that_diverges_is_recorded_as_such():
    """A replay weight beyond the numbers: the protection's gradient is infinite at the first step."""
    found = run(methods=["replay"], replay={"strengths": [1e308, 0.3]})
    bad, good = found.arms[1:]
    assert bad.diverged_at == 1
    assert "diverges" in bad.reason
    assert (good.diverged_at, good.steps[-1]) == (None, STEPS)
    assert choose(found, **LIMITS).label != bad.label


def test_an_arm_that_cannot_be_set_up_is_recorded_and_the_others_go_on():
    """Steps too small to move a parameter: no penalty has a gradient, so no strength can be set."""
    recipe = {"optimizer": "sgd", "learning_rate": 1e-300}
    settings = {"strengths": [3.0], "relaxations": []}
    found = run(training=recipe, methods=["alignguard", "ewc", "replay"], alignguard=settings, ewc=settings)
    ended = {arm.method: arm.diverged_at for arm in found.arms}
    assert ended == {"plain": None, "alignguard": NEVER_BEGUN, "ewc": NEVER_BEGUN, "replay": None}
    bad = found.arms[1]
    assert "no gradient after 3 plain steps" in bad.reason
    assert (bad.steps, bad.safety) == ([0], [0.0])
    summary = guard_summary(found, **LIMITS, judge=RefusalRule())["arms"][1]
    assert math.isnan(summary["safety"])
    assert math.isnan(summary["drift_share"])
    assert ending(bad.diverged_at) == "could not be set up"


def test_the_task_loss_has_its_own_clean_rows():
    clean = SampleSet("clean", data(7, 3), classify)
    found = run(task_of(clean=clean), methods=["plain"])
    with torch.no_grad():
        want = float(torch.cat([classify(net(), batch) for batch in clean.batches]).mean())
    assert found.plain.task[0] == pytest.approx(want)
    assert found.task_source == "clean rows of their own"


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"replay": {"strengths": [-1]}}, "greater than 0"),
        ({"alignguard": {"strengths": [float("nan")]}}, "alignguard"),
        ({"methods": ["magic"]}, "magic"),
        ({"methods": ["ewc", "ewc"]}, "twice"),
        ({"replay": {"strengths": []}}, "at least 1"),
        ({"ewc": {"relaxations": [5]}}, "less than 4"),
    ],
)
def test_bad_settings_are_refused(settings, what):
    with pytest.raises(ValueError, match=what):
        GuardConfig.model_validate(settings)


def test_what_a_model_cannot_do_is_said():
    with pytest.raises(ConfigError, match="temperature"):
        run(methods=["ewc"], ewc={"temperature": 2.0})
    task = task_of()
    biases = dataclasses.replace(task, parameter_names=["0.bias", "3.bias"])
    with pytest.raises(ConfigError, match="no weight of a linear layer"):
        run(biases, methods=["alignguard"])


def test_plain_always_comes_first():
    assert [arm.label for arm in arm_names(GuardConfig(methods=["replay", "plain"]))] == [
        *("plain", "replay 0.1", "replay 0.3"),
    ]


def test_terms_and_gradient_norms_are_recorded():
    arm = run(methods=["alignguard"], alignguard={"strengths": ["as_given"], "relaxations": []}).arms[1]
    assert {"fisher", "task", "overlap", "geodesic", "‖∇fisher‖", "‖∇task‖", "‖∇penalty‖"} <= set(arm.terms)
    assert math.isnan(arm.terms["fisher"][0])
    assert arm.terms["fisher"][-1] > 0
    assert arm.terms["geodesic"][-1] == pytest.approx(0, abs=1e-12)
    assert "geodesic term is zero" in arm.note


def test_protect_from_python_is_the_stage():
    settings = {"methods": ["plain", "replay"], "calibration_steps": 3}
    config = PipelineConfig(training={**RECIPE, "max_steps": STEPS}, guard=settings, seed=3)
    made = arisk.protect(task_of(), config)
    assert [arm.method for arm in made.arms][:2] == ["plain", "replay"]
    assert timeless(made) == timeless(run(methods=["plain", "replay"]))


def numbers_of(arm):
    """An arm without what another processor, or another minute, changes."""
    return {**dataclasses.asdict(arm), "cpu_seconds": None, "setup_seconds": None}


@pytest.mark.parametrize("samples", [64, 7])
@pytest.mark.parametrize("flipped", [0, 1])
def test_what_verify_has_trained_is_the_plain_arm_to_the_bit(monkeypatch, samples, flipped):
    trained = []
    carry_out = ArmRun.carry_out
    monkeypatch.setattr(
        ArmRun, "carry_out", lambda self, folder: trained.append(self.name.label) or carry_out(self, folder)
    )
    task = task_of(clean=SampleSet("clean", data(7, 3, flip=flipped), classify))
    training = TrainingConfig().model_copy(update=RECIPE)
    measured = verify(task, config=VerifyConfig(), training=training, steps=STEPS, seed=3, task_samples=64)
    config = {"methods": ["plain", "replay"], "task_samples": samples}
    alone = run(task, **config)
    assert trained[0] == "plain"
    others = trained[1:]
    trained.clear()
    spared = run(task, measured=measured, **config)
    # Other rows of the task loss are other numbers: then the arm is trained.
    assert trained == (others if samples == 64 else ["plain", *others])
    assert [numbers_of(arm) for arm in spared.arms] == [numbers_of(arm) for arm in alone.arms]
    assert spared.arms[0].cpu_seconds > 0


@pytest.mark.parametrize("change", [{"steps": 6}, {"control_samples": 3}, None])
def test_another_run_of_verify_is_no_plain_arm(monkeypatch, change):
    task, training = task_of(), TrainingConfig().model_copy(update=RECIPE)
    config, samples = VerifyConfig().model_copy(update=change or {}), 0 if change is None else 64
    measured = verify(task, config=config, training=training, steps=STEPS, seed=3, task_samples=samples)
    trained = []
    carry_out = ArmRun.carry_out
    monkeypatch.setattr(
        ArmRun, "carry_out", lambda self, folder: trained.append(self.name.label) or carry_out(self, folder)
    )
    run(task, measured=measured, methods=["plain"])
    assert trained == ["plain"]


@pytest.mark.parametrize("last", [1, 2, 8, 9, 60, 200, 10_000])
def test_an_arm_is_measured_at_few_of_the_steps_of_verify(last):
    points = measured_points(last)
    assert points[0] == 0
    assert points[-1] == last
    assert points == sorted(set(points))
    assert set(points) <= set(measured_steps(last))
    assert len(points) == min(9, last + 1)
