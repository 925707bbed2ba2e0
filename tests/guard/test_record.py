"""The rule that recommends an arm, on made records."""

import dataclasses
import math

import pytest

from arisk.config.sections import GuardSettings
from arisk.guard.choice import (
    choose,
    paired_error,
    paired_interval,
    standings,
    task_cost,
    task_error,
)
from arisk.guard.methods import arm_names
from arisk.guard.record import Arm, GuardResult
from arisk.guard.summary import ended, guard_summary
from arisk.models.judge import RefusalRule

LIMITS = {"threshold": 0.1, "tolerated": 0.05, "wanted": 0.5}


def arm(label, safety=0.4, task=1.0, **changes):
    values = {
        "label": label,
        "method": label.split()[0],
        "strength": None,
        "weights": {},
        "note": "n",
        "steps": [0, 1, 2],
        "safety_start": 0.05,
        "safety": [0.0, safety / 2, safety],
        "control": [0.0, 0.0, 0.01],
        "task": [2.0, 1.5, task],
        "surprising": [],
        "final_safety": [safety - 0.1, safety + 0.1],
        "final_task": [task - 0.1, task + 0.1],
        "terms": {},
        "cpu_seconds": 1.0,
        "setup_seconds": 0.0,
        "diverged_at": None,
        "reason": None,
    }
    return Arm(**{**values, **changes})


def result(*arms, **changes):
    values = {
        "horizon": 2,
        "last": 2,
        "arms": list(arms),
        "safety_rows": 2,
        "heldout": True,
        "start": 0.05,
        "task_rows": 8,
        "task_source": "rows",
        "trained_rows": 0,
        "warnings": [],
    }
    return GuardResult(**{**values, **changes})


def test_refusals_are_counted_where_there_are_answers():
    prompts = [{"prompt": "p", "response": "No, never that.", "line": 1}, {"prompt": "q", "response": ""}]
    found = result(
        arm("plain", answers=["Sure: here", "I can't."]),
        arm("ewc", answers=["No, never that again", "I CAN’T say"]),
        arm("replay", diverged_at=1),
        prompts=prompts,
        aligned_answers=["No, never that.", "well"],
    )
    body = guard_summary(found, **LIMITS, judge=RefusalRule())
    assert [one["refusals"] for one in body["arms"]] == [1, 2, None]
    assert (body["aligned_refusals"], body["answered_prompts"]) == (1, 2)
    silent = guard_summary(result(arm("plain"), generation_reason="why"), **LIMITS, judge=RefusalRule())
    assert (silent["aligned_refusals"], silent["refusals_missing"]) == (None, "why")


def test_the_least_drift_within_both_limits_wins():
    found = result(
        arm("plain"), arm("replay", 0.1, 1.04), arm("ewc", 0.01, 1.2), arm("alignguard", 0.19, 0.9)
    )
    choice = choose(found, **LIMITS)
    assert (choice.label, choice.rule) == ("replay", "met")
    assert "25%" in choice.sentence


def test_none_met_names_the_nearest():
    choice = choose(result(arm("plain"), arm("ewc", 0.3, 1.01), arm("replay", 0.01, 1.5)), **LIMITS)
    assert (choice.label, choice.rule) == (None, "none met")
    assert "nearest is ewc" in choice.sentence
    assert "75%" in choice.sentence
    assert "replay keeps enough, but at +50.0% task loss." in choice.sentence


def test_an_arm_that_breaks_another_limit_too_is_not_said_to_fail_by_its_task_loss():
    cheap, dear = behaves("ewc", 1, 0.3), {"task": 1.05, "safety": 0.1}
    over = told(behaves("plain", 1), cheap, behaves("replay", 9, ordinary=9, **dear))
    general = told(behaves("plain", 1), cheap, behaves("replay", 9, control=[0.0, 0.5, 0.9], **dear))
    only = told(behaves("plain", 1), cheap, behaves("replay", 9, **dear))
    told_of = [
        "keeps enough"
        in choose(found, threshold=0.1, tolerated=0.02, wanted=0.5, judge=RefusalRule()).sentence
        for found in (over, general, only)
    ]
    assert told_of == [False, False, True]


def test_nothing_to_protect():
    choice = choose(result(arm("plain", 0.05), arm("replay", 0.0)), **LIMITS)
    assert (choice.label, choice.rule) == ("plain", "nothing to protect")


def test_few_refusals_before_say_little_of_a_run_that_loses_none():
    prompts = [{"prompt": p, "response": ""} for p in "pqr"]
    told = {"prompts": prompts, "aligned_answers": ["I can't.", "well", "well"]}
    found = result(arm("plain", 0.01, answers=["I can't.", "I can't.", "well"]), arm("replay"), **told)
    choice = choose(found, **LIMITS, judge=RefusalRule())
    assert choice.rule == "nothing to protect"
    assert "refuses 2 of 3 prompts (before: 1)" in choice.sentence
    assert choice.sentence.endswith("So few refusals say little.")
    assert "say little" not in choose(result(arm("plain", 0.01), arm("replay")), **LIMITS).sentence


def test_plain_alone_is_nothing_tried():
    choice = choose(result(arm("plain", 0.5)), **LIMITS)
    assert (choice.label, choice.rule) == (None, "none tried")


def test_arms_of_nearly_one_strength_have_names_of_their_own():
    config = GuardSettings(replay={"strengths": [0.1, 0.10000001]}, alpha={"values": [0.25, 0.2500001]})
    names = [name.label for name in arm_names(config)]
    assert len(names) == len(set(names))
    assert {"replay 0.1", "replay 0.10000001", "alpha 0.2500001"} <= set(names)


def test_a_rise_that_recovers_still_counts_as_one():
    peak = dataclasses.replace(arm("plain", 0.05), safety=[0.0, 0.5, 0.05])
    assert choose(result(peak, arm("replay", 0.01)), **LIMITS).rule == "met"


def test_a_plain_run_that_ends_no_higher_than_it_began_needs_no_protection_there():
    back = {"safety": [0.0, 0.5, -0.1]}
    plain, other = dataclasses.replace(arm("plain"), **back), arm("replay", 0.1)
    choice = choose(result(plain, other), **LIMITS)
    assert (choice.label, choice.rule) == ("plain", "plain recovers")
    assert choice.sentence == (
        "The plain run rises to +0.500 nats on the way, but ends at -0.100, no higher than it began: its end "
        "needs no protection."
    )
    kept = dataclasses.replace(behaves("plain", 9), **back)
    choice = choose(told(kept, behaves("replay", 9, 0.1)), **LIMITS, judge=RefusalRule())
    assert "refuses 9 of 10 prompts (before: 9): its end needs no protection" in choice.sentence
    lost = dataclasses.replace(behaves("plain", 1), **back)
    choice = choose(told(lost, behaves("replay", 9, 0.1)), **LIMITS, judge=RefusalRule())
    assert (choice.label, choice.rule) == ("replay", "met")


def test_a_diverged_arm_is_never_good():
    bad = arm("replay", 0.0, 0.1, diverged_at=2, reason="nan")
    found = result(arm("plain"), bad)
    assert choose(found, **LIMITS).label is None
    assert math.isnan(task_cost(bad, found.plain))
    summary = guard_summary(found, **LIMITS, judge=RefusalRule())["arms"][1]
    assert math.isnan(summary["safety"])
    assert math.isnan(summary["drift_share"])
    assert choose(result(arm("plain", diverged_at=1, reason="nan")), **LIMITS).rule == "plain diverged"


def test_the_paired_error():
    plain = arm("plain", final_safety=[1.0, 2.0, 3.0])
    other = arm("ewc", final_safety=[1.0, 1.0, 1.0])
    assert paired_error([(other, plain)]) == pytest.approx(1 / math.sqrt(3))
    single = arm("ewc", final_safety=[1.0])
    assert math.isnan(paired_error([(single, single)]))
    assert math.isnan(paired_error([(other, plain), (arm("ewc", diverged_at=1), plain)]))


def test_seeds_are_no_new_rows():
    """The same rows on two seeds: equal differences leave the doubt of one, opposite ones none."""
    plain, other = arm("plain", final_safety=[1.0, 2.0, 3.0]), arm("ewc", final_safety=[1.0, 1.0, 1.0])
    opposite = arm("ewc", final_safety=[1.0, 3.0, 5.0])
    once = paired_error([(other, plain)])
    assert paired_error([(other, plain)] * 2) == pytest.approx(once)
    assert paired_error([(other, plain), (opposite, plain)]) == pytest.approx(0, abs=1e-12)


def test_the_error_of_the_task_cost_is_paired_by_row():
    plain = arm("plain", task=2.0, final_task=[1.0, 2.0, 3.0])
    other = arm("ewc", task=1.0, final_task=[1.0, 1.0, 1.0])
    assert task_error([(other, plain)]) == pytest.approx(1 / math.sqrt(3) / 2.0)
    # Rows that differ by the same leave no doubt, however far they lie apart.
    alike = arm("ewc", task=2.1, final_task=[1.1, 2.1, 3.1])
    assert task_error([(alike, plain)]) == pytest.approx(0, abs=1e-9)
    single = arm("ewc", final_task=[1.0])
    assert math.isnan(task_error([(single, single)]))
    assert math.isnan(task_error([(arm("ewc", diverged_at=1), plain)]))
    twice = standings(dataclasses.replace(result(plain, other), repeats=[again(plain), again(other)]))[1]
    assert twice.task_error == pytest.approx(1 / math.sqrt(3) / 2.0)


def again(run):
    return dataclasses.replace(run, seed=1)


PROMPTS = [{"prompt": str(i), "response": ""} for i in range(10)]


def says(refused, of=10):
    """Outcomes of which the first so many are refusals."""
    return ["refused"] * refused + ["answered"] * (of - refused)


def told(*arms, ordinary=0, **changes):
    return result(
        *arms,
        prompts=PROMPTS,
        aligned_outcomes=says(9),
        ordinary_prompts=PROMPTS,
        ordinary_outcomes=says(ordinary),
        **changes,
    )


def behaves(label, refused, safety=0.4, task=1.0, ordinary=0, **changes):
    return arm(label, safety, task, outcomes=says(refused), ordinary_outcomes=says(ordinary), **changes)


def test_refusals_kept_decide_where_plain_loses_some():
    """The arm with less drift keeps fewer refusals."""
    found = told(behaves("plain", 1), behaves("replay", 8, 0.3), behaves("ewc", 5, 0.1))
    choice = choose(found, **LIMITS, judge=RefusalRule())
    assert choice.label == "replay"
    assert "refuses 8 of 10 prompts where the plain run refuses 1 (before: 9)" in choice.sentence
    assert choose(found, **LIMITS).label == "ewc"
    none = told(behaves("plain", 1), behaves("replay", 4, 0.0))
    assert (
        "No arm reaches ≥ 50% of the 8 lost refusals" in choose(none, **LIMITS, judge=RefusalRule()).sentence
    )


def test_one_prompt_recommends_nothing():
    """Plain refuses one prompt less than before: who keeps it is chance, so drift decides."""
    found = told(behaves("plain", 8), behaves("replay", 9, 0.39), behaves("ewc", 8, 0.1))
    choice = choose(found, **LIMITS, judge=RefusalRule())
    assert choice.label == "ewc"
    assert "(25%)" in choice.sentence
    assert "Refusals tell no difference: 8 of 10 (before: 9)." in choice.sentence


@pytest.mark.parametrize(("safety", "rule"), [(0.1, "met"), (0.39, "none met")])
def test_refusals_kept_within_chance_need_less_drift_as_well(safety, rule):
    """Two of the four prompts that plain loses: its interval holds 0."""
    found = told(behaves("plain", 5), behaves("replay", 7, safety))
    assert standings(found, RefusalRule())[1].refusals_interval[0] == 0
    assert choose(found, **LIMITS, judge=RefusalRule()).rule == rule


def test_less_drift_does_not_make_up_for_refusals_that_are_lost():
    none = told(behaves("plain", 1), behaves("replay", 1, 0.0), behaves("ewc", 2, 0.2))
    choice = choose(none, **LIMITS, judge=RefusalRule())
    assert choice.label is None
    assert "nearest is replay" in choice.sentence
    fewer = told(behaves("plain", 9), behaves("replay", 3, 0.0), behaves("ewc", 9, 0.1))
    assert choose(fewer, **LIMITS, judge=RefusalRule()).label == "ewc"


def test_a_loss_that_stays_below_the_threshold_may_cost_refusals():
    quiet = told(behaves("plain", 2, 0.05), behaves("replay", 9, 0.04))
    assert choose(quiet, **LIMITS).rule == "nothing to protect"
    assert choose(quiet, **LIMITS, judge=RefusalRule()).label == "replay"
    kept = told(behaves("plain", 9, 0.05), behaves("replay", 9, 0.04))
    assert "refuses 9 of 10 prompts (before: 9)" in choose(kept, **LIMITS, judge=RefusalRule()).sentence


def test_an_arm_that_refuses_everything_or_drifts_on_ordinary_rows_is_not_recommended():
    over = told(behaves("plain", 1), behaves("ewc", 9, ordinary=4), behaves("replay", 7, ordinary=1))
    assert choose(over, **LIMITS, judge=RefusalRule()).label == "replay"
    always = told(behaves("plain", 1), behaves("ewc", 9, ordinary=4), ordinary=4)
    assert choose(always, **LIMITS, judge=RefusalRule()).label == "ewc"
    general = told(behaves("plain", 1), behaves("ewc", 9, control=[0.0, 0.1, 0.2]), behaves("replay", 7))
    assert choose(general, **LIMITS, judge=RefusalRule()).label == "replay"


def test_seeds_are_averaged_each_against_the_plain_run_of_its_seed():
    found = told(
        behaves("plain", 1, 0.4),
        behaves("replay", 7, 0.2),
        repeats=[behaves("plain", 3, 0.6, 2.0, seed=1), behaves("replay", 8, 0.1, 2.2, seed=1)],
    )
    plain, replay = standings(found, RefusalRule())
    assert plain.safety == pytest.approx(0.5)
    assert replay.safety == pytest.approx(0.15)
    assert replay.drift_share == pytest.approx(0.3)
    assert replay.task_cost == pytest.approx(0.05)
    assert (plain.refusals, replay.refusals) == (2.0, 7.5)
    assert replay.saved == pytest.approx(5.5 / 7)
    body = guard_summary(found, **LIMITS, judge=RefusalRule())
    assert (body["seeds"], body["arms"][1]["refusals"]) == (2, 7.5)
    gone = dataclasses.replace(found, repeats=[found.repeats[0], behaves("replay", 8, seed=1, diverged_at=3)])
    assert choose(gone, **LIMITS, judge=RefusalRule()).label is None
    assert guard_summary(gone, **LIMITS, judge=RefusalRule())["arms"][1]["diverged_at"] == 3


def test_a_seed_on_which_plain_diverges_is_left_out_and_nothing_is_shown_as_nan():
    gone = behaves("plain", 0, 9.0, seed=1, diverged_at=2, reason="nan")
    found = told(behaves("plain", 1), behaves("replay", 8, 0.1), repeats=[gone])
    assert choose(found, **LIMITS, judge=RefusalRule()) == choose(
        dataclasses.replace(found, repeats=[]), **LIMITS, judge=RefusalRule()
    )
    body = guard_summary(found, **LIMITS, judge=RefusalRule())
    assert (body["recommended"], body["seeds"]) == ("replay", 1)
    assert [one["diverged_at"] for one in body["arms"]] == [None, None]
    assert not [key for one in body["arms"] for key in ("safety", "task", "cost") if math.isnan(one[key])]
    whole = [behaves("plain", 3, 0.6, seed=2), behaves("replay", 9, 0.3, seed=2)]
    plain, replay = standings(dataclasses.replace(found, repeats=[gone, *whole]), RefusalRule())
    assert (plain.safety, plain.refusals) == (pytest.approx(0.5), 2)
    assert (replay.safety, replay.refusals) == (pytest.approx(0.2), 8.5)


def test_an_arm_that_was_never_begun_was_tried_on_no_further_seed():
    gone = behaves("ewc", 0, diverged_at=0, reason="no gradient")
    late = behaves("kl", 0, diverged_at=3, reason="nan")
    repeats = [again(behaves("plain", 1)), again(behaves("kl", 8))]
    found = told(behaves("plain", 1), gone, late, repeats=repeats)
    arms = guard_summary(found, **LIMITS, judge=RefusalRule())["arms"]
    assert [ended(one) for one in arms[1:]] == ["could not be set up", "diverged at step 3 on 1 of 2 seeds"]


def test_a_plain_run_that_rises_on_any_seed_is_something_to_protect_from():
    found = result(arm("plain", 0.05), arm("replay", 0.01))
    assert choose(found, **LIMITS).rule == "nothing to protect"
    risen = [arm("plain", 0.3, seed=1), arm("replay", 0.01, seed=1)]
    assert choose(dataclasses.replace(found, repeats=risen), **LIMITS).label == "replay"


def test_the_paired_interval():
    assert paired_interval([1.0] * 10, 0.8) == (10.0, 10.0)
    lower, upper = paired_interval([1.0] * 5 + [0.0] * 95, 0.8)
    # Binomial with mean 5 and variance 4.75: 80 % lie within ± 2.8.
    assert lower == pytest.approx(5 - 1.28 * 4.75**0.5, abs=1)
    assert upper == pytest.approx(5 + 1.28 * 4.75**0.5, abs=1)
    assert all(math.isnan(end) for end in paired_interval([], 0.8))
    mixed = told(behaves("plain", 1), behaves("replay", 8))
    assert standings(mixed, RefusalRule())[1].refusals_interval[0] > 0


def test_the_judge_is_asked_once_for_the_same_answers():
    asked = []

    def judge(exchanges):
        asked.append(tuple(exchanges))
        return ["refused"] * len(exchanges)

    arms = [arm(label, answers=[label] * 10, ordinary_answers=[label] * 10) for label in ("plain", "replay")]
    guard_summary(result(*arms, prompts=PROMPTS, ordinary_prompts=PROMPTS), **LIMITS, judge=judge)
    assert len(asked) == len(set(asked)) == 2
