"""Protections outside the stage: in a loop of one's own, and in a real Trainer."""

import dataclasses

import pytest
import torch

from arisk.base.errors import ConfigError, NumericsError
from arisk.gradients import layout_of, measuring
from arisk.guard import (
    MovePart,
    Relaxation,
    RunAverage,
    consolidation,
    divergence,
    projection,
    replay,
    safety_subspace,
    subspace_projection,
)
from arisk.models.anchored import ReferenceLosses, constrained
from arisk.models.losses import per_sample_nll
from arisk.models.trainer import ConstrainedTrainerMixin, ProjectedTrainerMixin, following
from tests.guard.test_afterwards import net
from tests.guard.test_run import classify, data, run, task_of
from tests.models.test_trainer import arguments, tiny

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def flat(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_replay_takes_the_next_minibatch_at_every_call():
    model, samples = net(), task_of().safety
    added = replay(model, samples, weight=0.5, rows=4, seed=2)
    values = [float(added.penalty().total.detach()) for _ in range(3)]
    order = torch.randperm(3, generator=torch.Generator().manual_seed(2))
    batches = list(samples.batches)
    assert values == pytest.approx([0.5 * float(classify(model, batches[i]).mean().detach()) for i in order])


def test_divergence_pulls_back_towards_the_model_as_it_was():
    model, _, safety = tiny()
    model.eval()
    added = divergence(model, safety, weight=2.0)
    assert float(added.penalty().total.detach()) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.3)
    here = float(added.penalty().total.detach())
    assert here > 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        added.penalty().total.backward()
        optimizer.step()
    assert float(added.penalty().total.detach()) < here


def test_consolidation_is_the_quadratic_form_of_the_fisher_diagonal():
    model, samples = net(), task_of().safety
    rows = []
    for x, y in samples.batches:
        for i in range(len(x)):
            model.zero_grad()
            classify(model, (x[i : i + 1], y[i : i + 1])).mean().backward()
            rows.append(flat(model))
    fisher = torch.stack(rows).square().mean(0)
    model.zero_grad()
    added = consolidation(model, samples, weight=3.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    assert float(added.penalty().total.detach()) == pytest.approx(3 * 0.01 * float(fisher.sum()), rel=1e-9)


def test_projection_leaves_no_gradient_against_safety():
    model, samples = net(), task_of().safety
    batch = data(2, 1, flip=1)[0]
    project = projection(model, samples, rows=4, seed=1)
    for turn in range(3):
        model.zero_grad()
        classify(model, batch).mean().backward()
        before = flat(model)
        cosine = project()
        order = torch.randperm(3, generator=torch.Generator().manual_seed(1))
        own = classify(model, list(samples.batches)[int(order[turn])]).mean()
        safety = torch.cat([g.flatten() for g in torch.autograd.grad(own, list(model.parameters()))])
        assert cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(before, safety, dim=0)))
        assert float(flat(model) @ safety) >= -1e-12


class Path(transformers.TrainerCallback):
    """Weights after every step."""

    def __init__(self):
        self.seen = []

    def look(self, model):
        self.seen.append([p.detach().clone() for p in model.parameters() if p.requires_grad])

    def on_train_begin(self, args, state, control, **kwargs):
        self.look(kwargs["model"])

    def on_step_end(self, args, state, control, **kwargs):
        self.look(kwargs["model"])


@pytest.mark.parametrize("observer", [RunAverage(0.5), MovePart(0.25)])
def test_a_trainer_ends_with_the_weights_of_the_observer(tmp_path, observer):
    model, rows, _ = tiny()
    path = Path()
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=4),
        train_dataset=rows,
        callbacks=[path, following(observer)],
    )
    trainer.train()
    start, end = path.seen[0], path.seen[-1]
    want = [a + 0.25 * (b - a) for a, b in zip(start, end, strict=True)]
    if isinstance(observer, RunAverage):
        want = start
        for weights in path.seen[1:]:
            want = [m + (w - m) / 2 for m, w in zip(want, weights, strict=True)]
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    assert all(torch.allclose(p, w, atol=1e-7) for p, w in zip(trained, want, strict=True))
    assert any(not torch.equal(p, b) for p, b in zip(trained, end, strict=True))


def resumed(folder, observer_of):
    """A trainer that goes on from its checkpoint of step 2, on a model made anew; and that model's start."""
    for steps in (2, 4):
        model, rows, _ = tiny()
        start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        settings = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=2)
        calls = [following(observer_of(model))] if steps == 4 else []
        trainer = transformers.Trainer(model=model, args=settings, train_dataset=rows, callbacks=calls)
        if steps == 2:
            trainer.train()
    return trainer, start


def test_a_resumed_run_takes_the_move_back_towards_the_start_that_was_given(tmp_path):
    trainer, start = resumed(tmp_path, lambda model: MovePart(0.0, start=model))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    left = [p.detach() for p in trainer.model.parameters() if p.requires_grad]
    assert all(torch.equal(p, q) for p, q in zip(left, start, strict=True))


@pytest.mark.parametrize("observer", [RunAverage(0.5), MovePart(0.5)])
def test_a_resumed_run_without_its_start_is_refused(tmp_path, observer):
    trainer, _ = resumed(tmp_path, lambda _: observer)
    with pytest.raises(ConfigError, match="goes on from a checkpoint") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert "start=model" in caught.value.fix


def drawn_anew(model):
    """The adapter as another process attaches it, whose random numbers are others."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                torch.nn.init.kaiming_uniform_(parameter, a=5**0.5)
    return model


@pytest.mark.parametrize("kind", ["move", "consolidation", "subspace"])
@pytest.mark.parametrize("anew", [True, False])
def test_a_resumed_run_whose_adapter_was_drawn_anew_is_refused(tmp_path, kind, anew):
    safety = tiny()[2]
    observers = {
        "move": lambda model: MovePart(0.5, start=model),
        "consolidation": lambda model: Relaxation(consolidation(model, safety, weight=1.0).value),
        "subspace": lambda model: Projecting(subspace_projection(model, safety, rank=2)),
    }
    trainer, _ = resumed(tmp_path, lambda m: observers[kind](drawn_anew(m) if anew else m))
    if not anew:
        trainer.train(resume_from_checkpoint=True)
        return
    with pytest.raises(ConfigError, match="other LoRA matrices A") as caught:
        trainer.train(resume_from_checkpoint=True)
    assert "same seed" in caught.value.fix


class Projecting(MovePart):
    """Calls a projection after every step."""

    def __init__(self, project):
        super().__init__(1.0)
        self.project = project

    def begin(self, model, steps, done=0):
        self.model = model

    def step(self):
        for parameter in self.model.parameters():
            parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
        self.project()

    def end(self):
        self.model.zero_grad()


def test_a_start_of_other_parameters_is_refused():
    model = net()
    observer = MovePart(0.5, start=model)
    next(model.parameters()).requires_grad_(False)
    with pytest.raises(ConfigError, match="other parameters train"):
        observer.begin(model, 4)


class Constrained(ConstrainedTrainerMixin, transformers.Trainer):
    pass


def test_a_trainer_on_constrained_first_tokens_is_a_loop_with_that_loss(tmp_path):
    found = {}
    for name in ("trainer", "loop"):
        model, rows, _ = tiny()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows[:4]]
        if name == "trainer":
            settings = arguments(tmp_path, max_steps=3, optim="sgd", learning_rate=0.5, max_grad_norm=0.0)
            Constrained(model=model, args=settings, train_dataset=rows).train()
        else:
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            reference = ReferenceLosses()
            reference.add(model, batch)
            tied = constrained(reference)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
            for _ in range(3):
                optimizer.zero_grad()
                (tied.sums(model, batch).sum() / tied.counts(batch).sum()).backward()
                optimizer.step()
        found[name] = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    assert torch.allclose(found["trainer"], found["loop"], atol=1e-6)


class Projected(ProjectedTrainerMixin, transformers.Trainer):
    pass


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainers_gradients_are_changed_once_per_optimizer_step(tmp_path, accumulation):
    model, rows, _ = tiny()
    asked = []

    def none():
        asked.append(1)
        for parameter in model.parameters():
            parameter.grad = None if parameter.grad is None else torch.zeros_like(parameter.grad)

    before = [p.detach().clone() for p in model.parameters()]
    settings = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=accumulation, optim="sgd")
    Projected(model=model, args=settings, train_dataset=rows, project=none).train()
    assert len(asked) == 3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_own_refusals_are_made_of_prompts_alone():
    from arisk.models.from_trainer import safety_rows
    from tests.guard.test_pipeline import task

    job = task(rows=6)
    prompts = [{"prompt": row["prompt"]} for row in job.safety.rows]
    rows = safety_rows(job.model, job.safety.generate.tokenizer, prompts, batch_size=2)
    said = job.safety.generate(job.model, range(len(prompts)), 128)
    answers = dict(zip((row["prompt"] for row in job.safety.rows), said, strict=True))
    assert rows.rows
    assert all(answers[row["prompt"]] == row["response"] for row in rows.rows)
    assert float(torch.cat([per_sample_nll(job.model, b).detach() for b in rows.batches]).mean()) < 0.5


def test_the_subspace_projection_is_that_of_the_stage():
    model, samples = net(), task_of().safety
    layout = layout_of(model, [name for name, _ in model.named_parameters()])
    with measuring(model, layout):
        directions = safety_subspace(model, layout, samples, rank=3)
    project = subspace_projection(model, samples, rank=3)
    classify(model, data(2, 1)[0]).mean().backward()
    before = flat(model)
    share = project()
    inside = directions.T @ (directions @ before)
    assert torch.allclose(flat(model), before - inside)
    assert share == pytest.approx(float(inside.norm() / before.norm()))


def test_relaxation_goes_down_the_penalty_after_every_step(tmp_path):
    """One curvature: a Trainer without a rate ends (1 − c/2)^(repeats · steps) away from the anchor."""
    model, rows, _ = tiny()
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    anchor = [p - 1 for p in start]
    value = lambda: sum((p - a).square().sum() for p, a in zip(trained, anchor, strict=True))  # noqa: E731
    observer = Relaxation(value, factor=1.0, repeats=2)
    transformers.Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, learning_rate=0.0),
        train_dataset=rows,
        callbacks=[following(observer)],
    ).train()
    for p, a in zip(trained, anchor, strict=True):
        assert torch.allclose(p.detach(), a + 0.5**4, atol=1e-5)


@pytest.mark.parametrize("make", [replay, divergence, consolidation], ids=lambda f: f.__name__)
def test_an_addition_that_is_not_finite_says_which(make):
    model, _, safety = tiny()
    added = make(model, safety, weight=1.0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.fill_(float("nan"))
    with pytest.raises(NumericsError, match=f"{make.__name__} adds is nan"):
        added.penalty()


def test_a_projection_that_is_not_finite_leaves_the_gradient_and_says_so():
    model, samples = net(), task_of().safety
    project = projection(model, dataclasses.replace(samples, loss_fn=broken))
    classify(model, data(2, 1)[0]).mean().backward()
    before = flat(model)
    with pytest.raises(NumericsError, match="safety gradient of projection is not finite"):
        project()
    assert torch.equal(flat(model), before)


def broken(model, batch):
    """A loss like any other, whose gradient is NaN."""
    return classify(model, batch) + sum((0 * p).sqrt().sum() for p in model.parameters())


def test_an_arm_whose_safety_gradient_is_not_a_number_is_named_and_the_others_go_on():
    task = task_of()
    safety = dataclasses.replace(task.safety, loss_fn=broken)
    found = run(dataclasses.replace(task, safety=safety), methods=["projection", "smaller"])
    reasons = {arm.method: arm.reason for arm in found.arms}
    assert "safety gradient of projection" in reasons.pop("projection")
    assert set(reasons.values()) == {None}


def moved(model):
    """Move the model as `Trainer(…)` does, in place of its parameters; there is no other device here."""
    for parameter in model.parameters():
        gradient, parameter.grad = parameter.grad, None
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(parameter.detach().to("meta")))
        parameter.grad = None if gradient is None else gradient.to("meta")


def test_safety_rows_follow_a_model_that_moves():
    model, samples, devices = net(), task_of().safety, []

    def seen(model, batch):
        devices.append({x.device.type for x in batch})
        return classify(model, batch)

    samples = dataclasses.replace(samples, loss_fn=seen)
    added, project = replay(model, samples), projection(model, samples)
    added.value()
    moved(model)
    assert added.value().device.type == "meta"
    classify(model, tuple(x.to("meta") for x in data(2, 1)[0])).mean().backward()
    with pytest.raises(RuntimeError, match="meta tensors"):  # No number can be read there.
        project()
    assert devices == [{"cpu"}, {"meta"}, {"meta"}]


def test_a_divergence_hands_its_rows_over_where_the_model_is():
    model, _, safety = tiny()
    added, devices = divergence(model, safety), []

    def forward(*args, **kwargs):
        devices.append(kwargs["input_ids"].device.type)
        raise InterruptedError

    model.forward = forward
    moved(model)
    with pytest.raises(InterruptedError):
        added.value()
    assert devices == ["meta"]


def test_reference_diagonals_and_directions_follow_a_model_that_moves():
    model, samples = net(), task_of().safety
    added, project = consolidation(model, samples, weight=1.0), subspace_projection(model, samples, rank=3)
    classify(model, data(2, 1)[0]).mean().backward()
    moved(model)
    assert added.value().device.type == "meta"
    with pytest.raises(RuntimeError, match="meta tensors"):
        project()
