"""The section of protected fine-tunes: findings by rule, hostile labels escaped, holes said to be holes."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest

from arisk.base.artifacts import finite
from arisk.config.plan import Config
from arisk.config.sections import BehaviourConfig
from arisk.guard import summary
from arisk.guard.page import guard_findings, section
from arisk.guard.printed import guard_text
from arisk.guard.record import ArmForecast
from arisk.models.judge import RefusalRule
from tests.guard.test_record import arm, result
from tests.report.records import HOSTILE

CONFIG = Config.model_validate({"model": {"source": "python", "entry": "a.py:b"}})


def made(*arms, **changes):
    return section(result(*arms, **changes), CONFIG)


def html(found):
    return "".join(piece.html for piece in found.pieces)


def figures(found):
    return [piece.figure for piece in found.pieces if piece.figure]


def told(*arms):
    found = result(*arms)
    return guard_findings(section(found, CONFIG).summary["guard"])


def test_each_method_gets_one_sentence_by_its_best_arm():
    sentences = told(
        arm("plain", 1.0, final_safety=[1.0, 1.1]),
        arm("replay 0.1", 0.2, 1.01, final_safety=[0.2, 0.31]),
        arm("replay 0.3", 0.1, 1.018, final_safety=[0.1, 0.21]),
        arm("ewc 10", 0.05, 1.6),
        arm("alignguard 3", 0.99, 1.0, final_safety=[1.5, 0.5]),
        arm("projection conflict", 1.4, 1.0, final_safety=[1.4, 1.5]),
    )
    assert len(sentences) == 5
    assert sentences[0].startswith("replay 0.3: safety +0.100 instead of +1.000")
    assert "replay 0.3: 10 % of the plain drift at 2 % more task loss." in sentences
    assert any(s.startswith("ewc: no arm stays within the task limit; ewc 10") for s in sentences)
    assert any(
        s.startswith("alignguard 3: no difference of the safety drift beyond its error") for s in sentences
    )
    assert any(s.startswith("projection conflict: more safety drift than plain") for s in sentences)


def test_a_method_whose_arms_all_diverged_is_never_praised():
    bad = arm("ewc 10", 0.0, 0.1, diverged_at=3, reason="inf")
    assert "ewc: no arm reached its last step." in told(arm("plain"), bad)
    told_of = html(made(arm("plain"), bad))
    assert "diverged at step 3: inf" in told_of
    assert "ewc 10 (recommended)" not in told_of


def test_labels_and_reasons_are_escaped():
    found = made(arm("plain"), arm(f"x {HOSTILE}", note=HOSTILE, diverged_at=1, reason=HOSTILE))
    assert "<script>" not in html(found)
    assert "<img" not in html(found)


def test_the_summary_is_json_and_figures_have_no_nan():
    found = made(
        arm("plain", 0.2),
        arm("replay 0.1", 0.1, control=[], surprising=[1.0, 0.9, 0.8]),
        arm("ewc 3", diverged_at=2),
    )
    json.dumps(finite(dict(found.summary)), allow_nan=False)
    for figure in figures(found):
        json.dumps([list(figure.data), figure.layout], allow_nan=False)
        assert figure.rows
    assert "not measured" in html(found)
    assert found.markdown[0].startswith("Protected fine-tunes: ")


def test_where_there_is_nothing_to_protect_from_one_sentence_is_all():
    found = made(arm("plain", 0.01), arm("replay 0.1", 0.0))
    assert "there is nothing to protect from" in html(found)
    assert "<table" not in html(found)
    assert figures(found) == []
    assert len(found.markdown) == 2
    assert len(found.findings) == 1
    assert not found.advice


def test_forecasts_stand_beside_the_arms_and_say_what_was_trained():
    seen = [
        ArmForecast(
            label, label.split()[0], None, safety, 0.5, 0.0, 1.0, 9, 2.0, gone, gone and "inf", chosen
        )
        for label, safety, gone, chosen in (
            ("plain", 0.5, None, False),
            ("replay 0.1", 0.1, None, True),
            ("ewc 10", float("nan"), 3, False),
        )
    ]
    found = made(arm("plain"), arm("replay 0.1", 0.1), forecasts=seen)
    assert "Forecast of every arm (6 CPU s)" in html(found)
    assert "<td>50 %</td>" in html(found)
    json.dumps(finite(dict(found.summary)), allow_nan=False)
    assert [one["chosen"] for one in found.summary["guard"]["forecasts"]] == [False, True, False]


def test_why_an_arm_was_not_trained_is_said():
    reason = "the judge takes none of the answers for a refusal"
    forecasts = [
        forecast("plain"),
        forecast("kl 1", chosen=True),
        forecast("replay 0.1", kept=0.4, task=1.1),
        forecast("own_replay 0.3", safety=math.nan, diverged_at=0, reason=reason),
        forecast("ewc 10", safety=math.nan, diverged_at=3, reason="inf"),
    ]
    found = made(arm("plain"), arm("kl 1", diverged_at=2, reason="too strong"), forecasts=forecasts)
    for said in (
        html(found),
        guard_text(SimpleNamespace(found=finite(found.summary["guard"]), last_line="")),
    ):
        assert f"could not be set up: {reason}" in said
        assert "its forecast diverged at step 3: inf" in said
        assert "diverged at step 2: too strong" in said
    (row,) = [line.split() for line in said.splitlines() if "replay 0.1" in line]
    assert row[2:] == ["40%", "+10.0%", "+0.200"]
    assert "trained are the 1 of 4 arms" in said


def test_where_all_forecasts_diverge_the_table_says_what_was_trained():
    gone = {"safety": math.nan, "diverged_at": 3, "reason": "inf", "chosen": True}
    forecasts = [forecast("plain", **{**gone, "chosen": False}), forecast("kl 1", **gone)]
    found = html(made(arm("plain"), arm("kl 1", 0.1), forecasts=forecasts))
    assert "all were trained" in found
    assert found.count("<td>yes</td>") == 2
    assert "<td>no</td>" not in found


def forecast(label, safety=0.2, kept=0.5, task=1.0, diverged_at=None, reason=None, chosen=False):
    return ArmForecast(
        label, label.split()[0], None, safety, kept, 0.0, task, 9, 2.0, diverged_at, reason, chosen
    )


def test_the_alpha_curve_goes_from_the_aligned_model_to_the_plain_run():
    arms = [arm(f"alpha {a:g}", 0.4 * a, 2 - a, strength=a) for a in (0.75, 0.25)]
    (curve,) = [one for one in figures(made(arm("plain"), *arms)) if one.id == "guard-alpha"]
    assert curve.data[0]["x"] == [0.0, 0.25, 0.75, 1.0]
    assert curve.data[0]["y"] == pytest.approx([0.0, 0.1, 0.3, 0.4])
    assert curve.data[1]["y"] == pytest.approx([2.0, 1.75, 1.25, 1.0])
    assert not [one for one in figures(made(arm("plain"))) if one.id == "guard-alpha"]


@pytest.mark.parametrize("shift", [0, 1])
def test_a_plain_run_that_diverged_has_no_figure_of_costs(shift):
    found = made(arm("plain", diverged_at=shift, reason="nan"))
    assert figures(found)[0].missing
    assert found.summary["guard"]["rule"] == "plain diverged"


def test_refusals_stand_beside_the_losses_or_are_said_not_to_be_measured():
    prompts = [{"prompt": "p", "response": "No."}, {"prompt": "q", "response": "No."}]
    counted = made(
        arm("plain", answers=["Sure", "I cannot say"]), prompts=prompts, aligned_answers=["I refuse."] * 2
    )
    assert "<td>1\u00a0of\u00a02</td>" in html(counted)
    assert "the aligned model refuses 2 of them" in html(counted)
    arms = [
        arm(label, answers=[say, "I cannot say"]) for label, say in (("plain", "Sure"), ("ewc", "I refuse."))
    ]
    both = made(*arms, prompts=prompts, aligned_answers=["I refuse."] * 2)
    text = guard_text(SimpleNamespace(found=finite(both.summary["guard"]), last_line=""))
    assert "2 of 2 (+0 to +2)" in text
    assert "1 of 2 (" not in text
    assert "| plain | 0.4 | 100 % | 1 of 2 |" in "\n".join(counted.markdown)
    silent = made(arm("plain"), generation_reason="guard.generate is 0")
    assert "Refusals: not measured (guard.generate is 0)." in html(silent)


def test_every_number_is_the_mean_over_the_seeds():
    """Table, sentences, figures and JSON: plain drifts by 0.4 and 0.8, learns to 1 and 3."""
    runs = [arm("plain"), arm("replay 0.3", 0.1, 1.0), arm("alpha 0.5", 0.2, 1.5, strength=0.5)]
    again = [
        arm("plain", 0.8, 3.0, seed=1, cpu_seconds=3.0),
        arm("replay 0.3", 0.2, 3.0, seed=1, cpu_seconds=5.0, setup_seconds=4.0, weights={"λ": 3.0}),
        arm("alpha 0.5", 0.4, 3.5, strength=0.5, seed=1),
    ]
    runs[1] = dataclasses.replace(runs[1], weights={"λ": 1.0})
    found = made(*runs, repeats=again)
    body = found.summary["guard"]
    plain, replay, _ = body["arms"]
    assert [plain["safety"], plain["peak"], plain["task"]] == pytest.approx([0.6, 0.8, 2.0])
    assert [replay["cost"], replay["setup_seconds"], replay["weights"]["λ"]] == pytest.approx([1.5, 2, 2])
    assert "replay 0.3: safety +0.150 instead of +0.600 nats (25%)" in body["sentence"]
    assert "replay 0.3: 25 % of the plain drift" in " ".join(finding.sentence for finding in found.findings)
    pareto, _, alpha = figures(found)
    heights = {one["customdata"][0]: one["y"][0] for one in pareto.data}
    assert heights == pytest.approx({"plain": 0.6, "replay 0.3": 0.15, "alpha 0.5": 0.3})
    assert alpha.data[0]["y"] == pytest.approx([0, 0.3, 0.6])
    assert alpha.data[1]["y"] == pytest.approx([2.0, 2.5, 2.0])
    assert "Numbers are means over 2 runs" in html(found)
    text = guard_text(SimpleNamespace(found=finite(body), last_line=""))
    assert "each number is a mean of 2 runs" in text


@pytest.mark.parametrize(("left", "lines"), [(1, 2), (9, 0)])
def test_limits_are_drawn_where_refusals_decide(left, lines):
    """Of ten refusals plain loses nine, or one, which is chance: then drift decides, which is not drawn."""
    says = {n: ["refused"] * n + ["answered"] * (10 - n) for n in (left, 10)}
    prompts = [{"prompt": str(i), "response": ""} for i in range(10)]
    arms = [arm("plain", outcomes=says[left]), arm("replay 0.3", 0.1, outcomes=says[10])]
    found = made(*arms, prompts=prompts, aligned_outcomes=says[10])
    assert found.summary["guard"]["recommended"] == "replay 0.3"
    assert len(figures(found)[0].layout["shapes"]) == lines


@pytest.mark.parametrize("model", [None, "my/judge"])
def test_what_judged_is_said(monkeypatch, model):
    monkeypatch.setattr(summary, "judge_for", lambda *_: RefusalRule())
    judge = None if model is None else {"path": model}
    config = CONFIG.model_copy(update={"behaviour": BehaviourConfig.model_validate({"judge": judge})})
    said = {"prompts": [{"prompt": "p", "response": ""}], "aligned_answers": ["I cannot help."]}
    found = section(result(arm("plain", answers=["I cannot help."]), **said), config)
    by = "told by the model my/judge" if model else "told by their opening"
    assert by in html(found)
    assert by in guard_text(SimpleNamespace(found=finite(found.summary["guard"]), last_line=""))


@pytest.mark.parametrize("counted", [False, True])
def test_the_numbers_of_a_figure_stand_under_their_headings(counted):
    said = {"prompts": [{"prompt": "p", "response": ""}], "aligned_answers": ["I cannot help."]}
    answers = {"answers": ["I cannot help."]} if counted else {}
    found = made(arm("plain", **answers), arm("replay 0.3", 0.1, **answers), **(said if counted else {}))
    figure = next(one for one in figures(found) if one.id == "guard-pareto")
    assert ("refuses" in figure.header) == counted
    assert all(len(row) == len(one.header) for one in figures(found) for row in one.rows)
