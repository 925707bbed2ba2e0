"""The observer of what a model says: openings at every point, answers where they are due, reasons."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from arisk.base.errors import InputError
from arisk.base.task import SampleSet
from arisk.config.plan import Config
from arisk.models import load_task
from arisk.models.losses import per_sample_nll
from arisk.training.behaviour import Behaviour, spread_rows
from arisk.training.panels import panel_of

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
SETTINGS = {"prompts": 8, "ordinary_prompts": 4, "tokens": 10, "opening_tokens": 4}


@pytest.fixture(scope="module")
def task():
    data = {
        name: {"path": str(FIXTURES / "data" / f"{name}.jsonl")} for name in ("safety", "control", "risky")
    }
    return load_task(
        Config.model_validate(
            {
                "model": {"path": str(FIXTURES / "tiny-aligned"), "dtype": "float64"},
                "safety": {**data["safety"], "max_samples": 24},
                "finetune": data["risky"],
                "control": data["control"],
            }
        ),
        device=torch.device("cpu"),
    )


def moved(model, share):
    """The model with noise on its weights, as a share of their size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(share * parameter.std().nan_to_num() * noise)


@pytest.fixture
def model(task):
    kept = {name: value.clone() for name, value in task.model.state_dict().items()}
    yield task.model.eval()
    task.model.load_state_dict(kept)


def test_openings_at_every_point_and_answers_where_due(task, model):
    watch = Behaviour(task.safety, task.control, **SETTINGS)
    watch.measure(model, 0)
    watch.measure(model, 1)
    moved(model, 1.5)
    watch.measure(model, 5)
    watch.measure(model, 9, answer=True)
    found = watch.result()
    safety, ordinary = found.safety, found.ordinary
    assert (found.status, found.reason, found.ordinary_reason) == ("measured", None, None)
    assert safety.steps == [0, 1, 5, 9]
    assert safety.log_p.shape == (8, 4, 4)
    # Ordinary prompts are followed where they are answered.
    assert ordinary.steps == [0, 5, 9]
    assert ordinary.log_p.shape == (4, 3, 4)
    assert len({p["line"] for p in safety.prompts}) == 8
    # Nothing moved between the first two points; everything stood.
    assert torch.equal(safety.log_p[:, 0], safety.log_p[:, 1])
    assert bool((safety.kept[:, :2] == 4).all())
    assert bool((safety.log_p[:, 2].sum(1) < safety.log_p[:, 0].sum(1) - 1).all())
    # The openings fell at step 5: answered unasked; then as asked.
    assert [a.step for a in safety.answers] == [0, 5, 9] == [a.step for a in ordinary.answers]
    assert all(
        text.startswith(opening[: len(opening) - 1])
        for text, opening in zip(safety.answers[0].texts, safety.openings, strict=True)
    )
    assert safety.answers[0].texts != safety.answers[1].texts
    assert found.own_loss == pytest.approx(-float(safety.log_p[:, 0].mean()))


def test_answers_between_are_few(task, model):
    watch = Behaviour(task.safety, None, **SETTINGS)
    watch.measure(model, 0)
    lead = watch.watched["safety"]
    for step in range(1, 9):
        lead.stood = 2.0  # As if all openings had turned anew.
        watch.measure(model, step)
    assert [a.step for a in watch.result().safety.answers] == [0, 1, 2, 3]


def test_a_state_goes_on_as_if_nothing_had_happened(task, model):
    whole, first = (Behaviour(task.safety, task.control, **SETTINGS) for _ in range(2))
    for watch in (whole, first):
        watch.measure(model, 0)
    state = json.loads(json.dumps(first.state(), allow_nan=False))
    second = Behaviour(task.safety, task.control, **SETTINGS)
    second.restore(state)
    moved(model, 0.3)
    for watch in (whole, second):
        watch.measure(model, 4, answer=True)
    a, b = whole.result(), second.result()
    for name in ("safety", "ordinary"):
        one, two = getattr(a, name), getattr(b, name)
        torch.testing.assert_close(one.log_p, two.log_p, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(one.kept, two.kept)
        assert replace(one, log_p=None, kept=None) == replace(two, log_p=None, kept=None)
    assert a.own_loss == b.own_loss


def silent_set(generate, rows=3):
    prompts = [{"prompt": f"question {i}", "response": "No.", "line": i} for i in range(rows)]
    return SampleSet("safety", [torch.zeros(1)], lambda m, b: b, prompts, generate=generate)


@pytest.mark.parametrize(
    ("samples", "changes", "reason"),
    [
        (silent_set(None), {}, "no tokenizer"),
        (silent_set(lambda m, r, n: [""] * len(r), rows=0), {}, "does not name its safety rows"),
        (silent_set(lambda m, r, n: [""] * len(r)), {"prompts": 0}, "behaviour.prompts is 0"),
    ],
)
def test_what_cannot_be_measured_says_why(samples, changes, reason):
    watch = Behaviour(samples, None, **{**SETTINGS, **changes})
    watch.measure(nn.Linear(1, 1), 0, answer=True)
    found = watch.result()
    assert (found.status, found.safety, found.ordinary) == ("not_measured", None, None)
    assert reason in found.reason
    assert reason in found.ordinary_reason


def test_a_generation_that_breaks_is_a_reason_and_no_crash():
    def breaks(_model, _rows, _tokens):
        raise InputError("the model cannot generate text: no cache", where="here", fix="that")

    watch = Behaviour(silent_set(breaks), None, **SETTINGS)
    watch.measure(nn.Linear(1, 1), 0)
    watch.measure(nn.Linear(1, 1), 1)
    found = watch.result()
    assert found.reason == "the model cannot generate text: no cache"
    assert found.own_loss is None


def test_plain_answers_without_tokens_are_kept():
    watch = Behaviour(silent_set(lambda m, rows, n: [f"answer {i}" for i in rows]), None, **SETTINGS)
    watch.measure(nn.Linear(1, 1), 0)
    watch.measure(nn.Linear(1, 1), 3)
    watch.measure(nn.Linear(1, 1), 7, answer=True)
    found = watch.result()
    assert [(a.step, list(a.texts)) for a in found.safety.answers] == [
        (step, ["answer 0", "answer 1", "answer 2"]) for step in (0, 7)
    ]
    assert found.safety.log_p is None
    assert found.own_loss is None
    assert found.ordinary_reason == "there is no control data"


def test_losses_and_the_loss_of_openings(task):
    batches = list(task.safety.batches)
    panel = panel_of(task.safety, None, torch.device("cpu"))
    losses, openings = panel.losses_and_openings(task.model.eval(), 3)
    with torch.no_grad():
        plain = torch.cat([per_sample_nll(task.model, batch) for batch in batches])
    torch.testing.assert_close(losses, plain, rtol=1e-10, atol=1e-12)
    assert openings.shape == losses.shape
    assert not torch.allclose(openings, losses)
    scalar = replace(task.safety, loss_fn=lambda m, b: per_sample_nll(m, b).mean())
    alone, none = panel_of(scalar, None, torch.device("cpu")).losses_and_openings(task.model, 3)
    assert none is None
    torch.testing.assert_close(alone, plain, rtol=1e-10, atol=1e-12)


def test_rows_are_spread_and_different():
    for available in (1, 7, 48, 100):
        for count in (1, 5, 48, 200):
            rows = spread_rows(available, count)
            assert len(rows) == len(set(rows)) == min(available, count)
            assert all(0 <= row < available for row in rows)
    assert spread_rows(0, 5) == []
