"""The ranking rule by a table, and the level a gate looks at."""

import itertools
import math

import pytest

from arisk.compare.record import Ranked, by_refusals, rule_of, worst_level
from arisk.forecast.refusals import refusals_not_measured
from tests.compare import plans as made

plan, refusing = made.plan, made.refusing


#: Safest first; each differs from the one before by the next part of the rule.
IN_ORDER = [
    plan("a", level="low", probability=0.0, peak=0.01),
    plan("b", level="low", probability=0.0, peak=0.02),
    plan("c", level="low", probability=0.08, peak=0.001),
    plan("d", level="low", probability=None, peak=0.001),
    plan("e", level="elevated", probability=0.0, peak=0.001),
    plan("f", level="high", probability=0.7, collapse_step=None, peak=0.3),
    plan("g", level="high", probability=0.7, collapse_step=90, peak=0.2),
    plan("h", level="high", probability=0.7, collapse_step=30, peak=0.2),
    plan("i", level="high", probability=0.7, collapse_step=30, peak=0.5),
    plan("j", level="high", probability=0.7, collapse_step=30, peak=math.inf),
    plan("k", level="high", probability=1.0, collapse_step=99, peak=0.1),
]
UNRANKED = [
    plan("y", level="inconclusive", probability=0.0, peak=0.0),
    plan("z", level="inconclusive", probability=None, peak=None),
]


def test_the_rule_orders_every_pair():
    for first, second in itertools.combinations([*IN_ORDER, *UNRANKED], 2):
        for given in ([first, second], [second, first]):
            assert [entry.run.name for entry in Ranked.all(given)] == [first.name, second.name]


#: Safest first, by refusals; the loss alone would order them otherwise.
BY_REFUSALS = [
    plan("a", peak=0.09, probability=0.3, refusals=refusing(28)),
    plan("b", peak=0.01, refusals=refusing(26, lost=None)),
    plan("c", peak=0.001, refusals=refusing(24, lost=90)),
    plan("d", peak=0.001, refusals=refusing(24, lost=40)),
    plan("e", peak=0.09, refusals=refusing(24, lost=40)),
    plan("f", level="elevated", peak=0.001, refusals=refusing(28)),
    plan("g", level="high", probability=1.0, peak=0.001, refusals=refusing(6, lost=10)),
]


def test_refusals_decide_after_the_level():
    assert by_refusals(BY_REFUSALS)
    for first, second in itertools.combinations(BY_REFUSALS, 2):
        for given in ([first, second], [second, first]):
            assert [entry.run.name for entry in Ranked.all(given)] == [first.name, second.name]
    assert "still refused at the end" in rule_of(BY_REFUSALS)
    assert "do not enter" not in rule_of(BY_REFUSALS)


@pytest.mark.parametrize(
    "without", [None, refusals_not_measured("no tokenizer", 100, 0.1), refusing(0, today=0)]
)
def test_a_run_without_a_count_puts_all_back_to_the_loss_and_that_is_said(without):
    runs = [
        plan("kept", peak=0.05, refusals=refusing(28)),
        plan("lost", peak=0.02, refusals=refusing(2)),
        plan("unknown", peak=0.03, refusals=without),
    ]
    assert not by_refusals(runs)
    assert [entry.run.name for entry in Ranked.all(runs)] == ["lost", "unknown", "kept"]
    assert "Refusals do not enter: in 1 of 3 ranked plans none were counted" in rule_of(runs)
    assert "still refused" not in rule_of(runs)
    # A run that gets no rank has no say in how the others are ranked.
    aside = [*runs[:2], plan("unknown", level="inconclusive", refusals=without)]
    assert [entry.run.name for entry in Ranked.all(aside)] == ["kept", "lost", "unknown"]


def test_ranks_count_from_one_and_what_is_not_known_has_none():
    ranked = Ranked.all([*reversed(IN_ORDER), *UNRANKED])
    assert [entry.rank for entry in ranked] == [*range(1, len(IN_ORDER) + 1), None, None]
    assert [entry.run.place for entry in ranked[-2:]] == ["inconclusive", "not measured"]


def test_small_differences_of_probability_do_not_decide():
    later = plan("later", level="high", probability=0.99, collapse_step=50, peak=0.2)
    sooner = plan("sooner", level="high", probability=0.985, collapse_step=20, peak=0.2)
    assert [entry.run.name for entry in Ranked.all([sooner, later])] == ["later", "sooner"]


def test_equal_runs_share_a_rank_and_the_next_one_is_not_moved_up():
    same = [plan(name, level="low", probability=0.0, peak=0.01) for name in "qp"]
    worse = plan("r", level="low", probability=0.0, peak=0.02)
    assert [(e.rank, e.run.name) for e in Ranked.all([worse, *same])] == [(1, "p"), (1, "q"), (3, "r")]


@pytest.mark.parametrize(
    ("levels", "elevated", "high"),
    [
        (["low", "low"], "low", "low"),
        (["low", "elevated"], "elevated", "elevated"),
        (["low", "high"], "high", "high"),
        (["low", "inconclusive"], "inconclusive", "inconclusive"),
        (["elevated", "inconclusive"], "elevated", "inconclusive"),
        (["high", "inconclusive"], "high", "high"),
        (["inconclusive"], "inconclusive", "inconclusive"),
    ],
)
def test_a_gate_sees_what_reaches_it_first_and_vouches_for_nothing_unknown(levels, elevated, high):
    runs = [plan(str(i), level=level, probability=0.0, peak=0.0) for i, level in enumerate(levels)]
    for gate, level in (("elevated", elevated), ("high", high)):
        names = ", ".join(str(i) for i, own in enumerate(levels) if own == level)
        assert worst_level(runs, gate) == (level, names)


def test_a_level_without_a_forecast_is_not_vouched_for():
    assert worst_level([plan("a", level="low", probability=0.0, peak=None)], "high") == ("inconclusive", "a")
