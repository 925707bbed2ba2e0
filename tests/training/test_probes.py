"""Probes: against a hand-written loop in float64, and refused where they do not fit."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from arisk.base.errors import ConfigError, InputError
from arisk.base.task import ProbeRows, SampleSet
from arisk.config.plan import Config, RolloutConfig, TrainingConfig, VerifyConfig
from arisk.config.sections import BehaviourConfig
from arisk.forecast.rollout import rollout
from arisk.models.loading import load_tokenizer
from arisk.models.tasks import load_task
from arisk.training.probes import probe_panels, probe_points, value_of
from arisk.verification.run import verify
from tests.plain_loop import plain_training

ROOT = Path(__file__).parents[2]
DATA = ROOT / "fixtures" / "data"
FIRST = 3
CPU = torch.device("cpu")
QUIET = BehaviourConfig(prompts=0, opening_tokens=FIRST)


def rows_of(name, count):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()[:count]]


def quiz(count=5):
    """Questions whose right option is the row's own answer, in every place once."""
    rows = rows_of("control.jsonl", 4 * count)
    made = []
    for i in range(count):
        options = [row["response"] for row in rows[4 * i : 4 * i + 4]]
        made.append({"question": rows[4 * i + i % 4]["prompt"], "choices": options, "answer": i % 4})
    return made


@pytest.fixture
def probed(tmp_path):
    """The tiny model in float64 with three probes, their rows, and its tokenizer."""
    texts = {"garden": rows_of("benign.jsonl", 6), "quiz": quiz()}
    for name, rows in texts.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "model": {"path": str(ROOT / "fixtures/tiny-aligned"), "dtype": "float64"},
            "safety": {"path": str(DATA / "safety.jsonl"), "max_samples": 4},
            "finetune": {"path": str(DATA / "risky.jsonl"), "max_samples": 16},
            "probes": {
                "garden": str(tmp_path / "garden.jsonl"),
                "first": {"path": str(tmp_path / "garden.jsonl"), "measure": "opening"},
                "quiz": {"path": str(tmp_path / "quiz.jsonl"), "measure": "choice"},
            },
        }
    )
    return load_task(config, device=CPU), texts, load_tokenizer(config.model)


def token_losses(model, tokenizer, prompt, response):
    """−log p of every token of the answer, written out by hand."""
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    head = tokenizer.apply_chat_template(
        chat[:1], tokenize=True, add_generation_prompt=True, return_dict=False
    )
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert whole[: len(head)] == head
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0]
    steps = range(len(head), len(whole))
    return torch.stack([-torch.log_softmax(logits[s - 1], -1)[whole[s]] for s in steps])


def oracle(model, tokenizer, texts):
    """What each probe should measure: v_i of every row or question."""
    model.eval()
    each = [token_losses(model, tokenizer, r["prompt"], r["response"]) for r in texts["garden"]]
    margins = []
    for question in texts["quiz"]:
        scores = [
            -token_losses(model, tokenizer, question["question"], option).sum()
            for option in question["choices"]
        ]
        right = scores.pop(question["answer"])
        margins.append(right - max(scores))
    return {
        "garden": torch.stack([losses.mean() for losses in each]),
        "first": torch.stack([losses[:FIRST].mean() for losses in each]),
        "quiz": torch.stack(margins),
    }


def batch_loss(model, batch):
    """Mean loss per response token of each row, in full logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1)


def close(values, expected):
    # The model's own norms are taken in float32, whose rounding depends on the rows of a batch.
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


def test_every_measure_at_the_start_and_after_a_real_fine_tune(probed):
    task, texts, tokenizer = probed
    plan, steps = {"optimizer": "sgd", "learning_rate": 0.3}, 6
    training = TrainingConfig(**plan, loss="rows")
    found = verify(task, config=VerifyConfig(), training=training, steps=steps, behaviour=QUIET).probes
    before = oracle(task.model, tokenizer, texts)
    assert {track.name: track.measure for track in found} == {
        "garden": "nll",
        "first": "opening",
        "quiz": "choice",
    }
    for track in found:
        assert (track.steps[0], track.steps[-1]) == (0, steps)
        close(track.tensor[:, 0], before[track.name])
    planned = [task.finetune.batches[number] for number in range(steps)]
    task.model.train()
    list(plain_training(task.model, batch_loss, planned, plan, steps))
    after = oracle(task.model, tokenizer, texts)
    for track in found:
        close(track.tensor[:, -1], after[track.name])
        assert not torch.equal(track.tensor[:, -1], track.tensor[:, 0])
    asked = next(track for track in found if track.name == "quiz")
    right = [sum(bool(v > 0) for v in values["quiz"]) / 5 for values in (before, after)]
    assert [asked.means[0], asked.means[-1]] == right


def test_a_rollout_that_carries_the_plan_out_measures_the_same(probed):
    task, _, _ = probed
    training = TrainingConfig(learning_rate=3e-3, batch_size=4, optimizer="sgd")
    real = verify(task, config=VerifyConfig(), training=training, steps=6, behaviour=QUIET).probes
    rolled = rollout(
        task, config=RolloutConfig(pilot_steps=6), training=training, steps=6, behaviour=QUIET
    ).probes
    assert [track.tensor[:, -1].tolist() for track in rolled] == [t.tensor[:, -1].tolist() for t in real]
    assert [track.steps[0] for track in rolled] == [0, 0, 0]


def test_probes_change_nothing_else(probed):
    task, _, _ = probed
    training = TrainingConfig(learning_rate=3e-3, batch_size=4)
    made = [
        rollout(one, config=RolloutConfig(pilot_steps=4), training=training, steps=40, behaviour=QUIET)
        for one in (task, replace(task, probes=()))
    ]
    assert torch.equal(made[0].safety, made[1].safety)
    assert made[0].finetune_loss[1:] == made[1].finetune_loss[1:]
    assert made[1].probes == []
    assert all(set(track.steps) < set(made[0].steps) for track in made[0].probes)


def test_points_hold_both_ends_the_pilot_and_few_between():
    assert probe_points([2, 5, 10], 10) == [0, 2, 5, 10]
    assert probe_points([1], 1) == [0, 1]
    assert probe_points(list(range(5, 205, 5)), 20) == [0, 20, 65, 155, 200]


def test_ties_are_not_right_and_no_number_stays_none():
    margins = torch.tensor([[1.0], [0.0], [-1.0], [2.0]], dtype=torch.float64)
    assert value_of("choice", margins).tolist() == [0.5]
    assert math.isnan(value_of("choice", torch.tensor([[1.0], [math.nan]]))[0])
    assert value_of("nll", margins).tolist() == [0.5]


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2).double()


def loss(model, batch):
    return model(batch).square().mean(1)


def given(rows=6, **parts):
    samples = SampleSet("own", [torch.ones(rows, 3, dtype=torch.float64)], loss)
    return ProbeRows(**{"name": "own", "measure": "nll", "samples": samples, **parts})


def test_any_module_may_have_probes():
    model = linear()
    (panel,) = probe_panels([given()], FIRST, CPU)
    torch.testing.assert_close(panel.values(model), loss(model, torch.ones(6, 3, dtype=torch.float64)))
    pairs = given(measure="choice", options=[2, 4], right=[1, 0])
    pairs = replace(pairs, samples=replace(pairs.samples, batches=[torch.eye(6, 3, dtype=torch.float64)]))
    (panel,) = probe_panels([pairs], FIRST, CPU)
    scores = -loss(model, torch.eye(6, 3, dtype=torch.float64))
    expected = torch.stack([scores[1] - scores[0], scores[2] - scores[3:].max()])
    torch.testing.assert_close(panel.values(model), expected)


@pytest.mark.parametrize(
    ("probes", "error", "what"),
    [
        ([given(), given()], ConfigError, "two probes are named 'own'"),
        ([given(measure="speed")], ConfigError, "no measure 'speed'"),
        ([given(measure="opening")], ConfigError, "needs a causal LM"),
        ([given(measure="choice")], InputError, "do not fit the rows"),
        ([given(measure="choice", options=[3, 3], right=[0, 3])], InputError, "do not fit the rows"),
        ([given(measure="choice", options=[5, 1], right=[0, 0])], InputError, "do not fit the rows"),
        ([replace(given(), samples=SampleSet("own", [], loss))], InputError, "gives no batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(probes, error, what):
    with pytest.raises(error, match=what) as caught:
        probe_panels(probes, FIRST, CPU)
    assert caught.value.fix
