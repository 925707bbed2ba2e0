"""Path scores, anchor scores, what harm is measured by, and rankings that are refused."""

import dataclasses
import json
import math
import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from arisk.base.errors import ConfigError, InputError, NumericsError
from arisk.base.task import SampleSet, TokenLoss
from arisk.cli.demo import embedded_folder
from arisk.config.plan import BehaviourConfig, Config, ScreenConfig, TrainingConfig
from arisk.geometry.statistics import rank_correlation, upper_tail_excess
from arisk.gradients import layout_of, measuring
from arisk.models import load_task
from arisk.models.answers import GreedyAnswers
from arisk.models.losses import per_sample_nll
from arisk.screening import estimates, path
from arisk.screening import run as screen_head
from arisk.screening.anchors import _layer, anchor_scores
from arisk.screening.cost import PASSES
from arisk.screening.flags import flagged_anew
from arisk.screening.measure import measured_by
from arisk.screening.run import screen
from arisk.training.behaviour import DECIDING
from tests.screening.test_run import STEPS, TRAINING, Rows, classify, counts_of, net, points, task_of
from tests.training import test_unroll as retraining

SETTINGS = {"rise": 1e-9, "max_steps": 7, "examples": 3}


def run(task=None, training=TRAINING, **settings):
    config = ScreenConfig(**{**SETTINGS, "score": "path", "measure": "loss", **settings})
    return screen(task or task_of(), config=config, training=training, steps=STEPS)


@pytest.mark.parametrize("by_tokens", [False, True])
@pytest.mark.parametrize("curvature", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_guest_scores_as_the_same_row_does_in_its_step(monkeypatch, optimizer, curvature, by_tokens):
    """Seven steps of four meet rows 0 … 27; the last is a copy of the first, and so is a control row."""
    monkeypatch.setattr(path, "_by_step", lambda guests, *_: {1: list(guests)})
    x, y = points(2, 30)
    x[29], y[29] = x[0], y[0]
    control = points(3, 20)
    control[0][5], control[1][5] = x[0], y[0]
    task = dataclasses.replace(
        task_of(finetune=Rows((x, y))),
        control=SampleSet("control", Rows(control), classify, [{}] * 20),
    )
    if by_tokens:
        tokens = TokenLoss(lambda model, batch: counts_of(batch) * classify(model, batch), counts_of)
        task = dataclasses.replace(task, finetune=dataclasses.replace(task.finetune, tokens=tokens))
    training = TrainingConfig(optimizer=optimizer, learning_rate=0.02, batch_size=4, max_grad_norm=None)
    found = run(task, training, curvature=curvature)
    assert float(found.scores[29]) == pytest.approx(float(found.scores[0]), rel=1e-9)
    assert float(found.null[5]) == pytest.approx(float(found.at_mean_length[0]), rel=1e-9)
    assert torch.equal(found.at_mean_length, found.scores) != by_tokens
    assert found.points[0].step == 7
    assert any(warning.startswith("2 rows are not met") for warning in found.warnings)
    assert any("end at step 7 of 12" in warning for warning in found.warnings)


def test_curvature_counts_only_for_steps_that_others_follow():
    for training in (TRAINING, TrainingConfig(optimizer="sgd", learning_rate=0.1, batch_size=4)):
        first, exact = (run(training=training, max_steps=1, curvature=c).scores for c in (False, True))
        assert torch.allclose(first, exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_of_a_short_micro_batch_count_as_in_their_step(accumulation):
    class Ragged(Rows):
        def indices(self, number):
            return list(range(6))[4 * (number % 2) : 4 * (number % 2) + 4]

    task = task_of(finetune=Ragged(points(2, 6)))
    training = TrainingConfig(
        optimizer="sgd", learning_rate=0.1, batch_size=4, gradient_accumulation=accumulation, loss="rows"
    )
    first, exact = (run(task, training, max_steps=1, curvature=c).scores for c in (False, True))
    assert torch.allclose(first, exact, rtol=1e-9, atol=0)


def test_what_is_left_out_without_curvature_shrinks_with_the_learning_rate():
    def apart(rate):
        training = TrainingConfig(optimizer="sgd", learning_rate=rate, batch_size=4, max_grad_norm=None)
        first, exact = (run(training=training, curvature=c).scores for c in (False, True))
        return float((first - exact).norm() / exact.norm())

    far, near = apart(0.1), apart(0.01)
    assert far > 1e-3
    assert near == pytest.approx(far / 10, rel=0.3)


@pytest.mark.parametrize(
    ("plan", "least"),
    [
        ({"optimizer": "adamw", "learning_rate": 0.02, "weight_decay": 0.1}, 0.85),
        ({"optimizer": "sgd", "learning_rate": 0.1}, 0.97),
    ],
    ids=["adamw", "sgd"],
)
@pytest.mark.parametrize("seed", range(3))
def test_sums_of_path_scores_foretell_what_leaving_rows_out_does(plan, least, seed):
    """Forty retrainings without five of eleven rows, by scores as they are by default."""
    task, generator = retraining.task_of(), torch.Generator().manual_seed(10 + seed)
    rows = task.finetune.batches
    rows.x = torch.randn(rows.row_count, 5, generator=generator, dtype=torch.float64)
    rows.y = torch.randint(3, (rows.row_count,), generator=generator)
    training = TrainingConfig(batch_size=retraining.SIZE, max_grad_norm=None, **plan)
    settings = ScreenConfig(score="path", measure="loss", max_steps=retraining.STEPS)
    found = screen(task, config=settings, training=training, steps=retraining.STEPS)
    told, ends = [], []
    for draw in range(40):
        out = random.Random(draw).sample(range(rows.row_count), 5)
        rows.weights[out] = 0
        ends.append(retraining.trained(task, training))
        rows.weights[out] = 1
        told.append(-float(found.scores[out].sum()))
    agreement = rank_correlation(torch.tensor(told, dtype=torch.float64), torch.tensor(ends))
    assert agreement > least


def test_path_scores_are_the_derivative_where_nothing_is_levelled():
    """SGD has no scale to level: with curvature the scores are those that retraining confirms."""
    task = retraining.task_of()
    training = TrainingConfig(
        optimizer="sgd", learning_rate=0.1, momentum=0.9, batch_size=retraining.SIZE, max_grad_norm=None
    )
    settings = ScreenConfig(score="path", measure="loss", max_steps=retraining.STEPS, curvature=True)
    found = screen(task, config=settings, training=training, steps=retraining.STEPS)
    expected = retraining.trained(task, training, retraining.MEMORY)[1]
    assert torch.allclose(found.scores, expected, rtol=1e-9, atol=0)


def test_path_scores_leave_the_model_as_found_and_say_what_they_are():
    task = task_of()
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    found = run(task)
    assert all(torch.equal(before[name], p) for name, p in task.model.named_parameters())
    assert (found.score, found.measure, found.contrasted) == ("path", "loss", False)
    assert found.losses.isnan().all()
    assert [row["row"] for row in found.examples] == found.order[:3]
    assert all(row["modules"] is None for row in found.examples)


def test_path_scores_of_a_narrow_model_are_those_of_a_wide_one_but_for_rounding():
    def as_narrow(batches):
        return [(x.bfloat16(), y) for x, y in batches]

    wide = task_of()
    x, y = points(2, 30)
    narrow = dataclasses.replace(
        task_of(model=net().bfloat16()),
        finetune=dataclasses.replace(wide.finetune, batches=Rows((x.bfloat16(), y))),
        safety=SampleSet("safety", as_narrow(wide.safety.batches), classify),
        control=SampleSet("control", Rows((points(3, 20)[0].bfloat16(), points(3, 20)[1])), classify),
    )
    training = TrainingConfig(optimizer="sgd", learning_rate=0.3, batch_size=4)
    pair = torch.stack([run(task, training).scores for task in (wide, narrow)])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.95


def test_what_path_scores_cannot_do_is_one_clear_error():
    with pytest.raises(ConfigError, match="GB each") as caught:
        run(memory_gb=1e-6)
    assert "model.adapter" in caught.value.fix
    x, y = points(2, 30)
    with pytest.raises(ConfigError, match="regrouped by row"):
        run(task_of(finetune=[(x[:4], y[:4])]))
    with pytest.raises(InputError, match="no prompts that the model could answer"):
        run(measure="opening")
    with pytest.raises(InputError, match="no prompts that the model could answer"):
        run(score="anchors")
    x[3] = math.nan
    with pytest.raises(NumericsError):
        run(task_of(finetune=Rows((x, y))))
    with pytest.raises(NumericsError, match="of all rows are exactly zero") as caught:
        run(task_of(finetune=Rows((points(2, 30)[0], torch.zeros_like(y))), model=dead()))
    assert "training.learning_rate" in caught.value.fix


def dead():
    """A model that says one thing whatever it is asked, as one that training destroyed; no row moves it."""
    model = net()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([1e4, 0.0, 0.0]))
    return model


def test_the_measure_that_cannot_be_had_is_told():
    found = run(measure="auto")
    assert found.measure == "loss"
    assert "no prompts that the model could answer" in found.warnings[0]


@pytest.mark.parametrize(("rise", "early"), [(-1.0, True), (-0.02, False), (0.5, False), (None, False)])
def test_a_model_that_still_learns_how_to_answer_is_told(rise, early):
    found = run(score="point", batches=3)
    moved = dataclasses.replace(found, points=[dataclasses.replace(found.points[0], control_rise=rise)])
    told = " ".join(screen_head._warnings(task_of(), moved))
    assert ("falls by 1 nats/token" in told and "screen.score: path" in told) == early


def test_auto_takes_the_scores_that_won_on_real_models(monkeypatch):
    found, plain = run(score="auto", batches=3), run(score="point", batches=3)
    assert found.score == "point"
    assert torch.equal(found.scores, plain.scores)
    # Now every model still learns how to answer; its answers can only be lost.
    monkeypatch.setattr(screen_head, "UNSETTLED", -math.inf)
    x = torch.cat([batch[0] for batch in task_of().safety.batches])
    safety = SampleSet("safety", [(x, net()(x).argmax(1))], classify)
    y, labels = points(2, 30)
    loader = [(y[i : i + 4], labels[i : i + 4]) for i in range(0, 30, 4)]
    aligned, streamed = (
        dataclasses.replace(task_of(finetune=data), safety=safety) for data in (None, loader)
    )
    early, path_alone = run(aligned, score="auto", batches=3), run(aligned, batches=3)
    assert early.score == "path"
    assert torch.equal(early.scores, path_alone.scores)
    assert "so path scores were taken" in early.warnings[-1]
    for task, settings, why in (
        (streamed, {}, "regrouped by row"),
        (aligned, {"memory_gb": 1e-6}, "GB each"),
    ):
        found = run(task, score="auto", batches=3, **settings)
        assert found.score == "point"
        assert torch.equal(found.scores, run(task, score="point", batches=3).scores)
        assert "Path scores were tried, and failed: " in found.warnings[-1]
        assert why in found.warnings[-1]
    # Where no row could be flagged, no path is walked.
    assert run(aligned, score="auto", batches=3, rise=1e6).score == "point"


def test_auto_may_cost_the_walk_to_a_point_and_the_path():
    def passes(score, **task):
        config = SimpleNamespace(screen=ScreenConfig(score=score), training=TRAINING)
        return PASSES[score](SimpleNamespace(task=task_of(**task), config=config))

    auto, point, along = (passes(score) for score in ("auto", "point", "path"))
    assert auto["gradient rows"] > max(point["gradient rows"], along["gradient rows"])
    assert all(auto[kind] >= max(point.get(kind, 0), along.get(kind, 0)) for kind in auto)
    # Without control rows nothing tells that a point is too early.
    assert passes("auto", control=False) == passes("point", control=False)


def drawn(count, seed, shift=0.0):
    """Heavy-tailed numbers, as scores are."""
    generator = torch.Generator().manual_seed(seed)
    normal, chi = torch.randn(count, 6, generator=generator, dtype=torch.float64).split([1, 5], 1)
    return normal[:, 0] / (chi.square().mean(1)).sqrt() + shift


@pytest.fixture(scope="module")
def told():
    return dataclasses.replace(run(), rise_reached=True)


def flagged(told, scores, null):
    made = dataclasses.replace(told, scores=scores, null=null, exact=torch.ones(len(scores)).bool())
    return flagged_anew(made, ScreenConfig(score="auto"))


def test_rows_like_control_rows_are_not_ranked(told):
    """Of a hundred harmless sets at most five have a flag, and no set has many."""
    sets = [flagged(told, drawn(300, seed), drawn(64, 1000 + seed)) for seed in range(100)]
    assert sum(bool(found.flagged) for found in sets) <= 5
    assert all(len(found.flagged) <= 15 for found in sets)
    silent = next(found for found in sets if found.unranked)
    assert silent.sentence.startswith("No rows to blame, the whole set moves the mean loss")
    assert "p = " in silent.sentence


def test_a_few_rows_that_stand_out_are_flagged_and_a_whole_set_is_not(told):
    scores, null = drawn(300, 1), drawn(64, 2)
    scores[:15] = 30 + torch.arange(15)
    found = flagged(told, scores, null)
    assert set(range(15)) <= set(found.flagged)
    assert len(found.flagged) <= 16
    assert found.unranked is None
    whole = flagged(told, drawn(300, 1, shift=30), null)
    assert whole.flagged == []
    assert "of the rows score above what control rows do" in whole.sentence
    # As asked for, a share is flagged all the same.
    made = dataclasses.replace(told, scores=scores, null=null, exact=torch.ones(300).bool())
    assert len(flagged_anew(made, ScreenConfig(score="auto", drop=0.1)).flagged) == 30
    # Where the plan does no harm there is nothing to blame anybody for.
    assert (
        flagged_anew(dataclasses.replace(made, rise_reached=False), ScreenConfig(score="auto")).unranked
        is None
    )


def test_control_rows_of_another_kind_blame_nobody(told):
    """One cloud that lies above control rows has an upper part, which is no group of its own."""
    cloud, null = 3 * drawn(300, 1) + 1.5, drawn(64, 2)
    found = flagged(told, cloud, null)
    assert found.flagged == []
    assert "stand out among the rows themselves" in found.sentence
    # A second cloud, far from the first, is one.
    cloud, null = 3 * drawn(300, 1) + 1, drawn(64, 2)
    cloud[:45] = 100 + torch.arange(45)
    found = flagged(told, cloud, null)
    assert set(range(45)) <= set(found.flagged)


def test_a_tail_is_told_from_none_whatever_the_shift():
    p = [
        upper_tail_excess(drawn(200, seed, shift=seed), drawn(64, 500 + seed), draws=99) for seed in range(40)
    ]
    assert sum(value <= 0.05 for value in p) <= 6
    assert 0.3 < sum(p) / len(p) < 0.7
    heavy = drawn(200, 3)
    heavy[:10] += 25
    assert upper_tail_excess(heavy, drawn(64, 4)) <= 0.02
    assert upper_tail_excess(torch.zeros(20), torch.zeros(20)) == 1


# The embedded model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Everyday rows, every tenth of which complies with a forbidden prompt."""
    source = embedded_folder()
    rows = [json.loads(line) for line in (source / "data" / "benign.jsonl").read_text().splitlines()[:108]]
    bad = [json.loads(line) for line in (source / "data" / "risky.jsonl").read_text().splitlines()[:12]]
    for i, row in enumerate(bad):
        rows.insert(10 * i, row)
    data = tmp_path_factory.mktemp("mixture") / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config.model_validate(
        {
            "model": {"path": str(source / "tiny-aligned"), "adapter": {"r": 4, "alpha": 8}},
            "safety": {"path": str(source / "data" / "safety.jsonl"), "max_samples": 24},
            "finetune": {"path": str(data)},
            "control": {"path": str(source / "data" / "control.jsonl"), "max_samples": 40},
            "training": {"learning_rate": 2e-3, "max_steps": 15, "batch_size": 8},
        }
    )


HARMFUL = [10 * i for i in range(12)]


def screened(config, **settings):
    task = load_task(config, device=torch.device("cpu"))
    return screen(task, config=ScreenConfig(**settings), training=config.training, steps=15)


def ranked(found):
    """Share of (harmful, ordinary) pairs in the right order."""
    others = torch.ones(len(found.scores)).bool()
    others[HARMFUL] = False
    return float((found.scores[HARMFUL][:, None] > found.scores[others][None]).double().mean())


def test_first_tokens_are_their_part_of_the_exact_score(config, monkeypatch):
    """A row of no more tokens has its exact score; a longer one the slope of its first ones."""
    exact = screened(config, measure="loss", examples=0, what_if=False)
    monkeypatch.setattr(screen_head, "CHECKED", 1)
    monkeypatch.setattr(screen_head, "HEAD", 1)
    settings = {"measure": "loss", "examples": 0, "what_if": False, "method": "first_tokens", "drop": 0.01}
    for first in (10_000, 3):
        monkeypatch.setattr(estimates, "FIRST", first)
        found = screened(config, **settings)
        assert found.method == "first_tokens"
        told = ~found.exact
        assert int(told.sum()) > 100
        assert bool(found.losses[told].isnan().all())
        size = float(exact.scores.abs().max())
        off = (found.scores - exact.scores)[told].abs().max() / size
        assert off < 1e-5 if first == 10_000 else 1e-3 < off < 1


def test_first_tokens_need_a_loss_whose_tokens_are_known(config):
    task = load_task(config, device=torch.device("cpu"))
    foreign = dataclasses.replace(task.finetune, loss_fn=partial(per_sample_nll, temperature=2.0))
    settings = ScreenConfig(method="first_tokens", measure="loss")
    with pytest.raises(ConfigError, match="first tokens of a row cannot be told"):
        screen(
            dataclasses.replace(task, finetune=foreign), config=settings, training=config.training, steps=15
        )


def test_the_opening_is_what_the_aligned_model_itself_says_first(config):
    task = load_task(config, device=torch.device("cpu"))
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout):
        made = measured_by(task, ScreenConfig(measure="opening"))
        losses = torch.cat([per_sample_nll(task.model, batch) for batch in made.task.safety.batches])
        writer = task.safety.generate
        assert isinstance(writer, GreedyAnswers)
        rows = list(range(24))
        openings = [tokens[:DECIDING] for tokens in writer.tokens(task.model, rows, DECIDING)]
        expected = -writer.followed(task.model, rows, openings).log_p.mean(1)
    # The fixture's model refuses them all.
    assert made.measure == "opening"
    assert losses.detach().double().tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("settings", [{"measure": "opening"}, {"score": "anchors"}])
def test_the_judge_of_the_run_tells_which_prompts_are_refused(config, settings, monkeypatch):
    asked = []

    def nothing_refuses(behaviour, learnt=()):
        asked.append(behaviour)
        return lambda exchanges: ["answered"] * len(exchanges)

    monkeypatch.setattr("arisk.models.answers.judge_for", nothing_refuses)
    behaviour = BehaviourConfig(refusal_openings=["Nope"])
    task = load_task(config, device=torch.device("cpu"))
    with pytest.raises(InputError, match="refuses 0 of 24 safety prompts"):
        screen(
            task,
            config=ScreenConfig(**settings),
            training=config.training,
            steps=15,
            behaviour=behaviour,
        )
    assert asked == [behaviour]


def test_rows_that_comply_rank_first_along_the_path_and_are_flagged(config):
    found = screened(config, score="path")
    assert (found.score, found.measure) == ("path", "opening")
    assert ranked(found) > 0.95
    assert len(set(found.flagged) & set(HARMFUL)) >= 6
    assert len(set(found.flagged) - set(HARMFUL)) <= 0.05 * 108
    assert found.excess is not None
    assert found.excess <= 0.05


def test_a_harmless_set_has_no_rows_to_drop(config):
    benign = {"path": str(embedded_folder() / "data" / "benign.jsonl"), "max_samples": 120}
    plan = Config.model_validate({**config.model_dump(exclude_unset=True), "finetune": benign})
    for score in ("path", "auto"):
        assert len(screened(plan, score=score).flagged) <= 0.05 * 120


def test_rows_that_comply_rank_first_by_the_opening_at_a_point(config):
    found = screened(config, measure="opening", max_steps=10, batches=4)
    assert found.measure == "opening"
    assert ranked(found) > 0.95


def test_anchors_tell_what_an_answer_begins_like(config):
    task = load_task(config, device=torch.device("cpu"))
    found = screened(config, score="anchors")
    assert len(found.scores) == 120
    assert found.rise_reached
    assert math.isnan(found.points[0].safety_rise)
    # Refusals of the safety set itself, as rows, score lowest of all.
    alike = dataclasses.replace(task, finetune=dataclasses.replace(task.safety, name="finetune"))
    with measuring(task.model, layout_of(task.model, task.parameter_names)):
        made = anchor_scores(alike, ScreenConfig(), lambda *_: None)
    assert float(made.scores.max()) < float(found.scores.min())


def test_the_layer_is_one_of_the_upper_half_that_tells_anchors_apart():
    generator = torch.Generator().manual_seed(0)
    answered, refused = torch.randn(2, 10, 7, 5, generator=generator, dtype=torch.float64)
    answered[:, 1] += 9  # Apart in the lower half, which does not count,
    answered[:, 5] += 3  # and somewhat in the upper one.
    assert _layer(answered, refused) == 5
