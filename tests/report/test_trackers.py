"""A report in trackers: what they are given, what they keep, and a clear refusal where one is missing."""

import json
import math
import sys
import types

import pytest

from arisk.base.errors import MissingExtraError
from arisk.report import trackers
from arisk.report.trackers import Logged

LOGGED = Logged(
    {"level": "high"},
    {"safe_steps": 15.0, "probability": math.nan},
    {"loss/combined": ([0, 10], [0.0, 0.5]), "refused_share/median": ([0, 5, 10], [1.0, 0.5, math.inf])},
    "<!doctype html><p>all of it</p>",
)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("wandb", lambda folder: trackers.to_wandb(LOGGED)),
        ("mlflow", lambda folder: trackers.to_mlflow(LOGGED)),
        ("tensorboard", lambda folder: trackers.to_tensorboard(LOGGED, folder)),
    ],
)
def test_a_missing_package_is_one_clear_error(monkeypatch, tmp_path, name, call):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError) as refused:
        call(tmp_path)
    assert refused.value.exit_code == 7
    assert refused.value.fix == f"pip install {name}"
    assert list(tmp_path.iterdir()) == []


def test_curves_come_step_by_step_and_what_is_not_finite_is_left_out():
    assert list(LOGGED.points()) == [
        (0, {"arisk/loss/combined": 0.0, "arisk/refused_share/median": 1.0}),
        (5, {"arisk/refused_share/median": 0.5}),
        (10, {"arisk/loss/combined": 0.5}),
    ]
    assert LOGGED.single() == {"arisk/safe_steps": 15.0}


def test_mlflow_gets_metrics_tags_and_the_page(monkeypatch):
    got = []
    fake = types.ModuleType("mlflow")
    fake.log_metrics = lambda values, step=None: got.append((step, values))
    fake.set_tags = got.append
    fake.log_text = lambda text, path: got.append((path, text))
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    trackers.to_mlflow(LOGGED)
    assert [part[0] for part in got[:3]] == [0, 5, 10]
    assert got[3:] == [
        (None, {"arisk/safe_steps": 15.0}),
        {"arisk.level": "high"},
        ("arisk/report.html", LOGGED.page),
    ]


def test_tensorboard_reads_back_what_was_written(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    page = trackers.to_tensorboard(LOGGED, tmp_path / "new")
    assert page.read_text() == LOGGED.page
    events = accumulator.EventAccumulator(str(tmp_path / "new"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("arisk/refused_share/median")]
    assert read == [(0, 1.0), (5, 0.5)]


def test_wandb_keeps_curves_summary_and_the_page(monkeypatch, tmp_path):
    """The real package, offline."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = wandb.init(mode="offline", dir=str(tmp_path), project="test")
    trackers.to_wandb(LOGGED, run)
    assert run.summary["arisk/safe_steps"] == 15.0
    assert run.summary["arisk/level"] == "high"
    run.finish()


def test_a_report_logs_itself(monkeypatch, tmp_path):
    from tests.report import records as made

    collected, space, scored, forecast = made.records()
    from arisk.risk_report import RiskReport

    report = RiskReport(collected, space, scored, made.rolled(), forecast)
    got = []
    monkeypatch.setattr(trackers, "to_mlflow", got.append)
    report.to_mlflow()
    (logged,) = got
    assert logged.words["level"] == "high"
    assert logged.numbers["safe_steps"] == 40
    assert logged.curves["loss/combined"] == ([0, 50, 100], [0.0, 0.04, 0.2])
    assert "loss/bound" not in logged.curves
    assert logged.page == report.html()
    json.dumps([logged.numbers, logged.words])
    shown = report._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    assert "Risk: high" in shown
    assert len(shown) < 100_000
    assert "plotly" not in shown
