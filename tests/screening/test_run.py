"""Screening: every score against plain float64 autograd, and the properties a ranking must have."""

import dataclasses
import math

import pytest
import torch
from torch import nn

import arisk
from arisk import PipelineConfig
from arisk.anatomy.update import preconditioner
from arisk.base.artifacts import read_record, write_record
from arisk.base.errors import ConfigError, InputError, NumericsError
from arisk.base.task import SampleSet, Task, TokenLoss
from arisk.base.terminal import StageDisplay
from arisk.catalogue import catalogue
from arisk.config.plan import Config, RolloutConfig, ScreenConfig, TrainingConfig
from arisk.engine.run import run_task
from arisk.forecast.rollout import rollout
from arisk.geometry.statistics import rank_correlation
from arisk.gradients import layout_of, measuring
from arisk.screening import estimates
from arisk.screening import estimates as screen_passes
from arisk.screening import run as screen_head
from arisk.screening.estimates import worth_estimating
from arisk.screening.flags import flagged_anew
from arisk.screening.page import section
from arisk.screening.points import RowGroup, precision_of, row_products
from arisk.screening.record import ScreenResult
from arisk.screening.run import screen
from arisk.screening.stage import _flags_stand
from arisk.screening.what_if import WithoutRows, dropping
from arisk.training.loop import PlannedRun, keeping_parameters
from arisk.training.recipe import recipe_of

NAMES = ["0.weight", "0.bias", "2.weight"]
TRAINING = TrainingConfig(optimizer="adamw", learning_rate=0.02, batch_size=4, max_grad_norm=None)
STEPS = 12


def classify(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def points(seed, count):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (count,), generator=generator)


class Rows:
    """Planned batches that can be regrouped: rows in order, epoch after epoch."""

    def __init__(self, data, size=4):
        self.data, self.size = data, size

    @property
    def row_count(self):
        return len(self.data[0])

    def indices(self, number):
        return [(number * self.size + i) % self.row_count for i in range(self.size)]

    def of(self, rows):
        return tuple(part[list(rows)] for part in self.data)

    def sample(self, count):
        return list(range(min(count, self.row_count)))

    def __getitem__(self, number):
        return self.of(self.indices(number))

    def __iter__(self):
        number = 0
        while True:
            yield self[number]
            number += 1


def task_of(*, finetune=None, control=True, model=None):
    finetune = finetune or Rows(points(2, 30))
    held = isinstance(finetune, Rows)
    rows = [{"tokens": 1 + j % 7, "prompt": f"p{j}", "line": j + 1} for j in range(30)] if held else []
    x, y = points(1, 12)
    return Task(
        model=model or net(),
        safety=SampleSet("safety", [(x[:8], y[:8]), (x[8:], y[8:])], classify),
        finetune=SampleSet("finetune", finetune, classify, rows),
        control=SampleSet("control", Rows(points(3, 20)), classify, [{}] * 20) if control else None,
        parameter_names=NAMES,
    )


def run(task=None, **settings):
    config = ScreenConfig(**{"rise": 1e9, "max_steps": 7, "batches": 3, "examples": 5, **settings})
    return screen(task or task_of(), config=config, training=TRAINING, steps=STEPS)


def gradients(model, batch):
    """(B, P) one row at a time."""
    parameters = [dict(model.named_parameters())[name] for name in NAMES]
    rows = []
    for i in range(len(batch[0])):
        loss = classify(model, tuple(part[i : i + 1] for part in batch))[0]
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def oracle(step):
    """Safety and control part of every row's score, and K, from dense gradients at θ after `step` steps."""
    task = task_of()
    layout = layout_of(task.model, NAMES)
    planned = PlannedRun(task, layout, recipe_of(TRAINING, STEPS))
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(name in NAMES)
    for number in range(1, step + 1):
        planned.step(number)
    batch = [torch.cat(parts) for parts in zip(*task.safety.batches, strict=True)]
    safety, rows = gradients(task.model, batch), gradients(task.model, points(2, 30))
    control = gradients(task.model, points(3, 20))
    means = torch.stack([gradients(task.model, task.finetune.batches[i]).mean(0) for i in range(3)])
    d = preconditioner(task.model, layout, means.mean(0), means.var(0), TRAINING)
    left_out = torch.stack([torch.cat([control[:k], control[k + 1 :]]).mean(0) for k in range(20)])
    null = ((left_out - safety.mean(0)) * d * control).sum(1)
    first, against = -(rows * d) @ safety.mean(0), -(rows * d) @ control.mean(0)
    return first, against, null, safety @ (rows * d).T


@pytest.fixture(scope="module")
def made():
    return run()


def test_scores_are_those_of_dense_gradients(made):
    first, control, null, cross = oracle(7)
    assert [point.step for point in made.points] == [7]
    assert made.first_order.tolist() == pytest.approx(first.tolist(), rel=1e-9)
    assert made.control_order.tolist() == pytest.approx(control.tolist(), rel=1e-9)
    assert made.scores.tolist() == pytest.approx((first - control).tolist(), rel=1e-9)
    assert made.null.tolist() == pytest.approx(null.tolist(), rel=1e-9)
    for example in made.examples:
        rises = -cross[:, example["row"]]
        worst = torch.argsort(rises, descending=True)[:3].tolist()
        assert [h["sample"] for h in example["hurts"]] == [i for i in worst if rises[i] > 0]
        assert [h["rise"] for h in example["hurts"]] == pytest.approx(
            [float(rises[i]) for i in worst if rises[i] > 0], rel=1e-9
        )
        assert sum(m["share"] for m in example["modules"]) == pytest.approx(1)


def counts_of(batch):
    """Tokens of a row, told from what it holds."""
    return 1.0 + (10 * batch[0][:, 0].abs()).floor().double()


def test_a_row_counts_by_its_tokens_where_the_loss_of_a_step_does():
    tokens = TokenLoss(lambda model, batch: counts_of(batch) * classify(model, batch), counts_of)
    plain = task_of()
    task = dataclasses.replace(
        plain,
        finetune=dataclasses.replace(plain.finetune, tokens=tokens),
        control=dataclasses.replace(plain.control, tokens=tokens),
    )
    config = ScreenConfig(rise=1e9, points="start", examples=5, method="differences")
    made = {}
    for loss in ("tokens", "rows"):
        training = TrainingConfig(optimizer="sgd", learning_rate=0.02, batch_size=4, loss=loss)
        made[loss] = screen(task, config=config, training=training, steps=STEPS)
    counts = counts_of(points(2, 30))
    lengths = counts / counts.mean()
    assert float(lengths.std()) > 0.3
    by_tokens, by_rows = made["tokens"], made["rows"]
    assert by_tokens.scores.tolist() == pytest.approx((lengths * by_rows.scores).tolist(), rel=1e-9)
    # A row stands out by what it does at mean length.
    assert by_tokens.at_mean_length.tolist() == pytest.approx(by_rows.scores.tolist(), rel=1e-9)
    assert torch.equal(by_tokens.null, by_rows.null)
    assert by_tokens.p_values.tolist() == pytest.approx(by_rows.p_values.tolist(), rel=1e-6)
    assert by_tokens.order == torch.argsort(by_tokens.scores, descending=True).tolist()
    # The rows' own losses and gradients are shown as they are, and estimates are weighed as products are.
    assert torch.equal(by_tokens.gradient_norms, by_rows.gradient_norms)
    assert by_tokens.agreement == pytest.approx(by_rows.agreement) == pytest.approx(1)
    asked = flagged_anew(by_tokens, ScreenConfig(drop=0.1))
    assert asked.flagged == by_tokens.order[:3] != by_rows.order[:3]
    assert math.isnan(asked.threshold)
    assert "at mean length: the 0.1 of the rows" in asked.reasons(asked.flagged[0])[0]
    # Far out at mean length, and not the first ones by score.
    scores = by_tokens.null[torch.arange(30) % 20].clone()
    short = torch.argsort(lengths)[:2].tolist()
    scores[short] = 1e3 * by_tokens.null.abs().max()
    far = dataclasses.replace(by_tokens, scores=scores * lengths, rise_reached=True)
    found = flagged_anew(far, ScreenConfig())
    assert sorted(found.flagged) == sorted(short)
    assert found.threshold == pytest.approx(float(scores[short].min()))
    assert f"flagged from {found.threshold:.3g}: scores at mean length beyond" in found.reasons(short[0])[0]
    batch = [torch.cat(parts) for parts in zip(*task.safety.batches, strict=True)]
    pull = -gradients(net(), batch) @ (gradients(net(), points(2, 30)) * lengths[:, None]).T
    for example in by_tokens.examples:
        rises = pull[:, example["row"]]
        expected = sorted((float(rise) for rise in rises if rise > 0), reverse=True)[:3]
        assert [h["rise"] for h in example["hurts"]] == pytest.approx(expected, rel=1e-9)


def test_both_points_are_weighed_by_the_learning_rates_they_stand_for():
    made = run(points="both")
    early, late = made.points
    assert (early.step, late.step) == (0, 7)
    assert early.weight == pytest.approx(3 / 12)
    assert late.weight == pytest.approx(9 / 12)
    start, end = oracle(0), oracle(7)
    assert made.first_order.tolist() == pytest.approx((0.25 * start[0] + 0.75 * end[0]).tolist(), rel=1e-9)


def test_the_walk_stops_where_safety_has_risen():
    task = task_of()
    x = torch.cat([batch[0] for batch in task.safety.batches])
    # Answers that the model gives already can only be lost.
    aligned = SampleSet("safety", [(x, task.model(x).argmax(1))], classify)
    found = run(dataclasses.replace(task, safety=aligned), rise=1e-3, max_steps=12)
    assert found.points[-1].step in (5, 10)
    assert found.rise_reached
    assert found.points[-1].safety_rise >= 1e-3
    still = run(rise=1e9)
    assert not still.rise_reached
    assert still.flagged == []
    assert "no finding about later steps" in " ".join(still.warnings)


def test_batch_size_changes_no_score(made):
    for size in (1, 7, 64):
        assert run(batch_size=size).scores.tolist() == pytest.approx(made.scores.tolist(), rel=1e-9)


def test_permuted_rows_have_permuted_scores():
    """The rows of one full batch per step, so that the order changes nothing else."""
    x, y = points(2, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    plain = run(task_of(finetune=Rows((x, y), size=30)))
    moved = run(task_of(finetune=Rows((x[order], y[order]), size=30)))
    assert moved.scores.tolist() == pytest.approx(plain.scores[order].tolist(), rel=1e-7)


def test_a_loader_that_cannot_be_regrouped_is_scored_by_number(made):
    x, y = points(2, 30)
    batches = [(x[i : i + 4], y[i : i + 4]) for i in range(0, 30, 4)]

    def forever():
        while True:
            yield from batches

    class Endless:
        def __iter__(self):
            return forever()

    for loader in (batches, Endless()):
        found = run(task_of(finetune=loader), points="start")
        expected = run(points="start", batches=3)
        count = min(30, len(found.scores))
        assert len(found.scores) == (30 if loader is batches else STEPS * TRAINING.batch_size)
        assert found.scores[:count].tolist() == pytest.approx(expected.scores[:count].tolist(), rel=1e-9)
    assert dropping(
        task_of(finetune=batches), [1], config=RolloutConfig(), training=TRAINING, steps=STEPS
    ) == {"status": "not_measured", "reason": "the fine-tuning data cannot be regrouped by row"}


def test_the_model_is_left_as_found():
    task = task_of()
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    state = torch.random.get_rng_state()
    run(task)
    assert all(torch.equal(before[name], p) for name, p in task.model.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_control_the_contrast_is_said_not_to_be_measured():
    found = run(task_of(control=False))
    assert found.control_order is None
    assert found.null is None
    assert not found.contrasted
    assert found.null_source == "rows"
    assert torch.equal(found.scores, found.first_order)
    assert "the safety set has no prompts" in found.warnings[0]
    assert "was not measured" in found.warnings[1]


def test_a_row_that_is_not_finite_is_named():
    x, y = points(2, 30)
    x[17] = math.nan
    with pytest.raises(NumericsError) as caught:
        run(task_of(finetune=Rows((x, y))), points="start", batches=2)
    assert caught.value.where.startswith("row 17 ")


def test_a_share_is_flagged_exactly_and_the_rest_kept(made):
    found = flagged_anew(made, ScreenConfig(drop=0.1))
    assert found.flagged == made.order[:3]
    assert found.threshold == float(made.scores[found.flagged[-1]])
    assert torch.equal(found.scores, made.scores)
    assert [row["flagged"] for row in found.examples] == [True] * 3 + [False] * 2


def test_rows_far_outside_the_null_are_flagged_and_no_others(made):
    scores = made.null[torch.arange(30) % 20].clone()
    scores[[4, 11]] = 1e3 * made.null.abs().max()
    told = dataclasses.replace(made, scores=scores, rise_reached=True)
    assert sorted(flagged_anew(told, ScreenConfig()).flagged) == [4, 11]
    clean = dataclasses.replace(told, scores=made.null[torch.arange(30) % 20])
    assert flagged_anew(clean, ScreenConfig()).flagged == []
    usual = float(made.null.max())
    assert flagged_anew(clean, ScreenConfig(score="point")).sentence == (
        f"No row of 30 is flagged: the highest score is {usual:.3g}, that of a control row {usual:.3g}."
    )


def test_what_a_control_row_reaches_too_is_not_flagged(made):
    usual = made.null.abs().max()
    null = made.null.clone()
    null[7] = 1e3 * usual  # One control row far out moves no robust tail …
    scores = null[torch.arange(30) % 7].clone()
    scores[4], scores[11] = 9e2 * usual, 2e3 * usual
    told = dataclasses.replace(made, scores=scores, null=null, rise_reached=True)
    found = flagged_anew(told, ScreenConfig())
    assert float(found.p_values[4]) < 1e-6  # … so that this row stands out,
    assert found.flagged == [11]  # and only the one above every control row is flagged.


def test_a_data_set_of_which_nothing_would_be_kept_is_an_error(made):
    told = dataclasses.replace(made, scores=made.null.abs().max() * torch.full((30,), 1e6), rise_reached=True)
    with pytest.raises(InputError, match="none would be kept"):
        flagged_anew(told, ScreenConfig(score="point"))
    assert "100% of the rows score above what control rows do" in flagged_anew(told, ScreenConfig()).sentence


def test_a_killed_screening_goes_on_and_ends_the_same(made, tmp_path, monkeypatch):
    monkeypatch.setattr(screen_passes, "SHARD_ROWS", 8)
    done = 0
    products = screen_passes.row_products

    def dying(*given, **settings):
        nonlocal done
        done += 1
        if done == 7:  # three passes over the control rows come first
            raise KeyboardInterrupt
        return products(*given, **settings)

    config = ScreenConfig(rise=1e9, max_steps=7, batches=3, examples=5)
    monkeypatch.setattr(screen_passes, "row_products", dying)
    with pytest.raises(KeyboardInterrupt):
        screen(task_of(), config=config, training=TRAINING, steps=STEPS, workspace=tmp_path)
    kept = sorted(path.name for path in tmp_path.glob("rows-finetune-*.safetensors"))
    assert len(kept) == 3
    monkeypatch.setattr(screen_passes, "row_products", products)
    monkeypatch.setattr(screen_passes, "SHARD_ROWS", 8)
    again = screen(task_of(), config=config, training=TRAINING, steps=STEPS, workspace=tmp_path)
    assert torch.equal(again.scores, made.scores)
    assert torch.equal(again.null, made.null)


def test_a_sketch_that_keeps_everything_gives_the_exact_scores(made, monkeypatch):
    monkeypatch.setattr(screen_head, "CHECKED", 1)
    monkeypatch.setattr(screen_head, "HEAD", 1)
    found = run(method="sketch", sketch_side=8, drop=0.03)
    assert found.method == "sketch"
    assert not found.exact.all()
    assert found.scores.tolist() == pytest.approx(made.scores.tolist(), rel=1e-9)
    assert found.losses.tolist() == pytest.approx(made.losses.tolist(), rel=1e-12)


@pytest.mark.parametrize("settings", [{"points": "both"}, {"points": "risen"}, {"control": False}])
def test_differences_are_the_exact_scores_but_for_rounding(settings, monkeypatch):
    monkeypatch.setattr(screen_head, "CHECKED", 1)
    monkeypatch.setattr(screen_head, "HEAD", 1)
    task = task_of(control=settings.pop("control", True))
    exact = run(task, **settings)
    found = run(task, method="differences", drop=0.03, **settings)
    assert not found.exact.all()
    size = float(exact.scores.abs().max())
    assert found.scores.tolist() == pytest.approx(exact.scores.tolist(), abs=1e-6 * size)
    assert found.losses.tolist() == pytest.approx(exact.losses.tolist(), abs=1e-6)


def test_differences_of_a_narrow_model_are_taken_in_float32():
    """Steps along the direction are far below what bfloat16 weights can show."""
    task = task_of(model=net().bfloat16())
    x, y = points(2, 30)
    narrow = dataclasses.replace(
        task,
        finetune=dataclasses.replace(task.finetune, batches=Rows((x.bfloat16(), y))),
        safety=SampleSet("safety", [(b[0].bfloat16(), b[1]) for b in task.safety.batches], classify),
        control=SampleSet("control", Rows((points(3, 20)[0].bfloat16(), points(3, 20)[1])), classify),
    )
    found = run(narrow, points="start", method="differences")
    assert found.agreement > 0.9
    assert all(p.dtype == torch.bfloat16 for p in task.model.parameters())


@pytest.mark.parametrize("method", ["differences", "sketch"])
def test_the_head_of_an_estimated_ranking_is_exact_and_only_it_is_flagged(made, monkeypatch, method):
    monkeypatch.setattr(screen_head, "CHECKED", 5)
    monkeypatch.setattr(screen_head, "HEAD", 4)
    found = run(method=method, sketch_side=2, drop=0.2)
    exact = found.exact.nonzero()[:, 0].tolist()
    assert 10 <= len(exact) < 30  # five checked, and parts of four until one has no flag
    assert found.scores[exact].tolist() == pytest.approx(made.scores[exact].tolist(), rel=1e-9)
    others = (~found.exact).nonzero()[:, 0]
    for name in ("first_order", "control_order", "gradient_norms", "p_values"):
        values = getattr(found, name)
        assert values[others].isnan().all()
        assert not values[exact].isnan().any()
    assert found.scores.isfinite().all()
    assert found.flagged == [row for row in made.order if row in set(exact)][:6]
    assert {row["row"] for row in found.examples} <= set(exact)
    assert f"{len(exact)} of 30 rows are scored exactly" in found.warnings[-1]
    assert found.as_json()["exact_rows"] == len(exact)


def test_a_weak_estimate_is_said_to_be_one(monkeypatch):
    monkeypatch.setattr(screen_head, "TELLING", 1.1)
    # Where every row is scored exactly in the end, none lies further down.
    assert "harmful rows may lie" not in run(method="sketch", sketch_side=2).warnings[-1]
    for name in ("CHECKED", "HEAD"):
        monkeypatch.setattr(screen_head, name, 4)
    assert "harmful rows may lie further down" in run(method="sketch", sketch_side=2).warnings[-1]


@pytest.mark.parametrize("slope", [1e-9, 1.0, 1e9, 0.0])
def test_the_step_of_differences_is_neither_rounding_nor_beyond_the_numbers(slope):
    """Losses that bend at 1e-2, end at 1, and are rounded to 1e-7 as float32 losses are."""
    rows = slope * torch.linspace(0.5, 2, 8, dtype=torch.float64)

    def slopes(step):
        if step > 1:
            return torch.full((8,), math.nan, dtype=torch.float64)
        change = 2 * step * rows * (1 + (step / 1e-2) ** 2)
        return ((change / 1e-7).round() * 1e-7) / (2 * step)

    step = estimates._step(slopes, 1e-4)
    assert 0 < step <= 1
    if slope >= 1:
        assert slopes(step).tolist() == pytest.approx(rows.tolist(), rel=1e-3)


def test_a_row_whose_loss_is_not_finite_is_named_by_differences():
    x, y = points(2, 30)
    x[17] = math.nan
    with pytest.raises(NumericsError) as caught:
        run(task_of(finetune=Rows((x, y))), points="start", batches=2, method="differences")
    assert caught.value.where.startswith("row 17 ")


@pytest.mark.parametrize("method", ["differences", "sketch"])
def test_a_row_against_the_safe_answers_is_found_by_an_estimate(monkeypatch, method):
    """Prompts near one point with answer 0, and one row that answers 1 there among rows elsewhere."""
    monkeypatch.setattr(screen_head, "CHECKED", 4)
    monkeypatch.setattr(screen_head, "HEAD", 4)
    generator = torch.Generator().manual_seed(1)

    def drawn(count):
        return torch.randn(count, 200, generator=generator, dtype=torch.float64)

    point, model = drawn(1), nn.Linear(200, 3).double()
    nn.init.zeros_(model.weight)
    x, y = drawn(40), torch.randint(3, (40,), generator=generator)
    x[13], y[13] = point, 1
    task = Task(
        model=model,
        safety=SampleSet("safety", [(point + 0.1 * drawn(8), torch.zeros(8, dtype=torch.int64))], classify),
        finetune=SampleSet("finetune", Rows((x, y)), classify),
        control=SampleSet("control", Rows((drawn(20), torch.arange(20) % 3)), classify, [{}] * 20),
        parameter_names=["weight"],
    )
    config = ScreenConfig(points="start", batches=3, method=method, sketch_side=32)
    found = screen(
        task, config=config, training=TrainingConfig(optimizer="sgd", max_grad_norm=None), steps=STEPS
    )
    assert found.order[0] == 13
    assert found.flagged == [13]
    assert not found.exact.all()


def test_no_estimate_is_ever_flagged(made):
    doubtful = dataclasses.replace(
        made,
        method="sketch",
        scores=1e6 * made.null.abs().max() * torch.ones(30),
        exact=torch.zeros(30, dtype=torch.bool),
        rise_reached=True,
    )
    for config in (ScreenConfig(drop=0.5), ScreenConfig()):
        assert flagged_anew(doubtful, config).flagged == []


@pytest.mark.parametrize(
    ("method", "flagged", "stands"), [("exact", 9, True), ("sketch", 5, True), ("sketch", 6, False)]
)
def test_flags_set_anew_stand_only_well_within_the_exact_rows(made, method, flagged, stands):
    """Ten rows are exact: six flags among them may leave out a row that was only estimated."""
    record = dataclasses.replace(
        made, method=method, exact=torch.arange(30) < 10, flagged=list(range(flagged))
    )
    assert _flags_stand(record, made) is stands
    # Rows that were exact by score are not the first ones at mean length.
    long = dataclasses.replace(record, lengths=torch.ones(30, dtype=torch.float64), asked=True)
    assert _flags_stand(long, made) is (method == "exact")


def test_auto_estimates_many_rows_of_a_large_selection_only():
    model = net()
    whole, part = layout_of(model, NAMES), layout_of(model, ["0.bias"])
    assert worth_estimating(model, whole, 5000)
    assert not worth_estimating(model, whole, 4999)
    assert not worth_estimating(model, part, 10**6)
    assert not worth_estimating(model, whole, None)


@pytest.mark.parametrize("method", ["differences", "sketch"])
def test_a_killed_estimate_goes_on_and_ends_the_same(tmp_path, monkeypatch, method):
    monkeypatch.setattr(screen_passes, "SHARD_ROWS", 8)
    monkeypatch.setattr(screen_head, "CHECKED", 4)
    monkeypatch.setattr(screen_head, "HEAD", 4)
    config = ScreenConfig(rise=1e9, max_steps=7, batches=3, method=method, sketch_side=2, drop=0.1)
    settings = {"config": config, "training": TRAINING, "steps": STEPS, "workspace": tmp_path}
    whole = screen(task_of(), **settings)
    shards = sorted(tmp_path.glob(f"rows-finetune-rows-by-{method}-*.safetensors"))
    assert len(shards) == 4
    for lost in [*shards[2:], *tmp_path.glob("rows-finetune-rows-head-*")]:
        lost.unlink()
    kept = shards[0].stat().st_mtime_ns
    again = screen(task_of(), **settings)
    assert shards[0].stat().st_mtime_ns == kept
    assert torch.equal(again.scores, whole.scores)
    assert torch.equal(again.exact, whole.exact)
    assert again.flagged == whole.flagged


def test_a_plan_without_rows_trains_on_all_others_in_order():
    base = Rows(points(2, 10), size=3)
    left = WithoutRows(base, [1, 4])
    assert left.row_count == 8
    assert [left.indices(i) for i in range(3)] == [[0, 2, 3], [5, 6, 7], [8, 9, 0]]
    assert left.sample(4) == [0, 2, 3, 5]
    assert torch.equal(left[0][0], base.data[0][[0, 2, 3]])


def test_dropping_rolls_the_plan_out_with_and_without():
    task = task_of()
    layout = layout_of(task.model, NAMES)
    config = RolloutConfig(pilot_steps=12, rare_rows=False)
    found = dropping(task, [3, 5], config=config, training=TRAINING, steps=STEPS)
    ends = {}
    for name, batches in (
        ("before", task.finetune.batches),
        ("after", WithoutRows(task.finetune.batches, [3, 5])),
    ):
        one = task_of(finetune=None)
        one = dataclasses.replace(one, finetune=dataclasses.replace(one.finetune, batches=batches))
        with keeping_parameters(one.model, layout):
            planned = PlannedRun(one, layout, recipe_of(TRAINING, STEPS))
            before = torch.cat([classify(one.model, b) for b in one.safety.batches]).mean()
            for number in range(1, STEPS + 1):
                planned.step(number)
            ends[name] = float(
                (torch.cat([classify(one.model, b) for b in one.safety.batches]).mean() - before).detach()
            )
    for name, end in ends.items():
        assert found[name]["safety"][-1] == pytest.approx(end, rel=1e-6)
    assert dropping(task, [], config=config, training=TRAINING, steps=STEPS)["reason"] == "no row is flagged"


def test_the_record_survives_the_disk(made, tmp_path):
    write_record(tmp_path, made)
    again = read_record(tmp_path, ScreenResult)
    assert again.points == list(made.points)
    assert torch.equal(again.scores, made.scores)
    assert again.as_json()["sentence"] == made.sentence


@pytest.mark.parametrize(("rho", "says"), [(0.7, "long"), (-0.6, "short"), (0.2, None), (float("nan"), None)])
def test_a_score_that_follows_length_is_said(rho, says):
    found = dataclasses.replace(run(), length_correlation=rho)
    said = [sentence for sentence in found.findings() if "length" in sentence]
    assert [f"{says} responses" in sentence for sentence in said] == ([True] if says else [])


def test_length_is_compared_where_rows_tell_their_tokens():
    task = task_of()
    found = run(task)
    tokens = torch.tensor([row["tokens"] for row in task.finetune.rows], dtype=torch.float64)
    assert found.length_correlation == rank_correlation(found.scores, tokens)
    silent = dataclasses.replace(task, finetune=dataclasses.replace(task.finetune, rows=[{}] * 30))
    assert math.isnan(run(silent).length_correlation)


def test_a_product_beyond_the_numbers_names_its_row():
    model = nn.Linear(1, 1, bias=False)
    layout = layout_of(model, ["weight"])
    batch = torch.tensor([[1.0], [1e30], [1.0]])

    def steep(model, batch):
        return model(batch)[:, 0] * torch.where(batch[:, 0] > 1, 1e30, 1.0)

    with torch.no_grad():
        model.weight.zero_()
    group = RowGroup([4, 7, 9], batch)
    with measuring(model, layout), pytest.raises(NumericsError, match="row 7 overflows"):
        row_products(model, group, steep, layout, torch.ones(1, 1), engine="hooks")


@pytest.mark.parametrize("engine", ["hooks", "vmap", "loop"])
def test_rows_of_a_bfloat16_plan_are_scored_in_bfloat16_and_products_are_not(engine):
    model = net().float()
    x, y = points(2, 8)
    layout = layout_of(model, NAMES)
    directions = torch.randn(layout.numel, 2, generator=torch.Generator().manual_seed(0))
    group = RowGroup(list(range(8)), (x.float(), y))

    def products(precision):
        with measuring(model, layout):
            return row_products(
                model, group, classify, layout, directions, engine=engine, precision=precision
            )

    wide, narrow = products(None), products(torch.bfloat16)
    assert not torch.equal(wide, narrow)
    assert float((wide[:, :2] - narrow[:, :2]).norm() / wide[:, :2].norm()) < 0.02
    # Factors of eight bits, multiplied and summed in more: norms have digits that bfloat16 has not.
    assert not torch.equal(narrow[:, 2], narrow[:, 2].bfloat16().double())
    assert [
        precision_of(TRAINING.model_copy(update={"precision": p})) for p in ("weights", "bf16", "fp16")
    ] == [
        None,
        torch.bfloat16,
        None,
    ]


def test_screen_from_python_is_the_stage_with_its_what_if():
    task = task_of()
    settings = {"optimizer": "adamw", "learning_rate": 0.02, "batch_size": 4, "max_steps": STEPS}
    config = PipelineConfig(training=settings, screen={"drop": 0.2, "points": "start"})
    made = arisk.screen(task, config)
    same = screen(task, config=config.screen, training=config.training, steps=STEPS)
    assert torch.equal(made.scores, same.scores)
    assert made.flagged == same.flagged == made.order[:6]
    assert made.what_if["status"] == "measured"
    config.screen.what_if = False
    assert arisk.screen(task, config).what_if["status"] == "not_measured"
    with pytest.raises(ConfigError, match="drop"):
        config.screen.drop = 2.0


def test_what_the_rollout_has_measured_is_taken_over(tmp_path, monkeypatch):
    settings = {"optimizer": "adamw", "learning_rate": 0.02, "batch_size": 4, "max_steps": STEPS}
    config = Config.model_validate(
        {
            "model": {"source": "python", "entry": "a:b"},
            "training": settings,
            "screen": {"drop": 0.2, "points": "start"},
        }
    )
    calls, found = [], {}

    def counted(*args, **kwargs):
        calls.append(args)
        return rollout(*args, **kwargs)

    monkeypatch.setattr("arisk.screening.what_if.rollout", counted)
    for name, wanted in (("alone", ["screen"]), ("beside", ["rollout", "screen"])):
        folder, show = tmp_path / name, StageDisplay(quiet=True)
        found[name] = run_task(catalogue(), task_of(), config, wanted, run_dir=folder, show=show)
    what_if = {name: job.record("screen").what_if for name, job in found.items()}
    assert what_if["alone"] == what_if["beside"]
    # Twice alone, with and without the flagged rows; then the rollout was there already.
    assert len(calls) == 3


@pytest.mark.parametrize(("unsettled", "walked"), [(-math.inf, 2), (math.inf, 1)])
def test_flags_set_anew_are_those_of_a_run_that_knew_no_others(tmp_path, monkeypatch, unsettled, walked):
    """Where a point lies too early `auto` goes by whether a share is asked for: old scores do not serve."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return screen(*args, **kwargs)

    monkeypatch.setattr(screen_head, "UNSETTLED", unsettled)
    monkeypatch.setattr(screen_head, "screen", counted)
    given = {
        "model": {"source": "python", "entry": "a:b"},
        "training": TRAINING.model_copy(update={"max_steps": STEPS}).model_dump(),
        "screen": {"rise": 1e6, "max_steps": 7, "batches": 3, "what_if": False, "measure": "loss"},
    }

    def made(folder, **settings):
        config = Config.model_validate({**given, "screen": {**given["screen"], **settings}})
        show = StageDisplay(quiet=True)
        return run_task(catalogue(), task_of(), config, ["screen"], run_dir=folder, show=show).record(
            "screen"
        )

    first, then = made(tmp_path / "one"), made(tmp_path / "one", drop=0.1)
    assert first.score == "point"
    assert len(calls) == walked
    fresh = made(tmp_path / "two", drop=0.1)
    assert (then.score, then.flagged) == (fresh.score, fresh.flagged)
    assert torch.equal(then.scores, fresh.scores)


def test_what_a_run_does_is_not_told_where_none_was_looked_at():
    """At the aligned model alone nothing has risen yet: no sentence says what the whole set does."""
    scores = torch.arange(30.0).double() + 100
    scores[3] = -100.0
    far = dataclasses.replace(run(points="start"), scores=scores)
    found = flagged_anew(far, ScreenConfig(points="start", score="auto"))
    assert found.unranked is None
    assert "moves" not in found.sentence


def test_a_rise_below_the_wanted_one_is_no_absence_of_harm():
    found = run(rise=1e9)
    assert f"changes by {found.points[-1].safety_rise:+.3g} nats/token, less than the 1e+09" in found.sentence


def test_a_share_that_takes_all_rows_is_told_as_such():
    with pytest.raises(InputError, match=r"a share of 0\.99 is all of the 30 fine-tuning rows") as caught:
        run(drop=0.99)
    assert caught.value.where == "screen.drop"
    # And more than half is no finding where it was asked for.
    assert not any("More than half" in told for told in run(drop=0.9).findings())


def test_rows_that_keep_no_token_are_said():
    task = task_of()
    short = dataclasses.replace(task, finetune=dataclasses.replace(task.finetune, statistics={"dropped": 3}))
    assert any(told.startswith("3 rows keep no token") for told in run(short).warnings)
    assert not any("keep no token" in told for told in run(task).warnings)


@pytest.mark.parametrize(
    ("refused", "advised"), [((29, 38), True), ((38, 38), True), ((38, 29), False), (None, True)]
)
def test_dropping_is_no_advice_where_fewer_are_refused_without_the_rows(refused, advised):
    def curve(safety, end):
        told = {"start": 0.9, "end": end / 48, "low": 0.1, "high": 0.9, "prompts": 48, "confidence": 0.8}
        return {"steps": [0, STEPS], "safety": [0.0, safety], "control": None, "refusals": told}

    before, after = (curve(loss, end) for loss, end in zip((1.0, 0.1), refused or (0, 0), strict=True))
    if refused is None:
        before["refusals"] = after["refusals"] = None
    found = dataclasses.replace(
        run(drop=0.2), what_if={"status": "measured", "before": before, "after": after}
    )
    shown = section(found, show_text=True, max_examples=3, kept="kept.jsonl")
    assert bool(shown.advice) == advised
    if advised:
        more = refused is not None and refused[1] > refused[0]
        assert ("to be refused at the end, not" in shown.advice[0].sentence) == more
    if refused:
        assert "80 %: 5 to 43" in "".join(piece.html for piece in shown.pieces)
