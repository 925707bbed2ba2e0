"""What a change costs: stages, forecasters, protections and row scores of another package.

Each is one object in one table (`tests/toys.py`); no file of arisk is touched.
"""

import json
import sys

import pytest

import arisk.catalogue as stages
from arisk import cli
from arisk.base.artifacts import read_record
from arisk.forecast.record import ForecastResult
from arisk.forecast.run import FORECASTERS
from arisk.guard.methods import METHODS
from arisk.guard.record import GuardResult
from arisk.screening.estimates import ROW_SCORES
from arisk.screening.record import ScreenResult
from tests import toys
from tests.cli.test_verify import TASK


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tasks.py").write_text(TASK)
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {{source: python, entry: '{tmp_path}/tasks.py:make'}}\n"
        "training: {max_steps: 24, learning_rate: 0.05}\n"
        "score: {batches: 2, hvp_batches: 1, nulls: 3, examples: 4, probe_points: 2}\n"
        "forecast: {bootstrap_samples: 20}\n"
        "guard: {methods: [plain, ewc], task_samples: 8}\n"
    )
    return path


@pytest.fixture
def arisk(monkeypatch, capsys, config):
    """Call the command in this process; gives exit code and stdout."""

    def call(verb, *extra):
        given = [verb, *([config, "--run-dir", config.parent / "run"] if verb != "--help" else []), *extra]
        if verb == "check":
            given = [verb, config, *extra]
        monkeypatch.setattr(sys, "argv", ["arisk", *map(str, given)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
            raise SystemExit(0)
        out, err = capsys.readouterr()
        assert not caught.value.code, err
        return out

    return call


@pytest.fixture
def toy_stage(monkeypatch):
    monkeypatch.setattr(stages, "_STAGES", list(stages._STAGES))
    known = list(cli.app.registered_commands)
    stages.register(toys.STAGE)
    yield
    cli.app.registered_commands[:] = known


def test_a_stage_is_one_object(arisk, config, toy_stage):
    arisk("run")
    folder = config.parent / "run"
    assert "said the toy" in (folder / "report" / "report.html").read_text()
    rows = json.loads((folder / "report" / "summary.json").read_text())["toy"]["rows"]
    assert read_record(folder / "toy", toys.ToyResult).rows == rows > 0
    status = {row["stage"]: row["fresh"] for row in json.loads(arisk("status", "--json"))}
    assert status["toy"]
    assert status["report"]
    assert "toy" in json.loads(arisk("check", "--json"))["plan"]["stages"]
    assert toys.STAGE.help in arisk("--help")
    # The verb runs it alone, by its own name.
    assert json.loads(arisk("toy", "--force", "--json"))["ran"] == ["toy"]


def test_a_stage_may_not_read_what_comes_later(toy_stage):
    with pytest.raises(ValueError, match="named twice"):
        stages.register(toys.STAGE)


def test_forecasters_methods_and_row_scores_are_one_object_each(arisk, config, monkeypatch):
    monkeypatch.setitem(FORECASTERS, "toy", toys.forecaster)
    out = arisk("run", "--until", "forecast", "--json")
    assert json.loads(out)["ran"][-1] == "forecast"
    folder = config.parent / "run"
    assert read_record(folder / "forecast", ForecastResult).forecasters["toy"].status == "not_measured"
    METHODS["toy"], ROW_SCORES["toy"] = toys.METHOD, toys.ROW_SCORE
    try:
        arisk("guard", "--set", "guard.methods=[toy]")
        arms = read_record(folder / "guard", GuardResult).arms
        assert [arm.label for arm in arms] == ["plain", "toy half"]
        assert arms[1].safety != arms[0].safety
        arisk("screen", "--set", "screen.method=toy", "--set", "screen.points=start")
        found = read_record(folder / "screen", ScreenResult)
        assert found.method == "toy"
        assert any("their loss alone" in warning for warning in found.warnings)
        plan = json.loads(arisk("check", "--json", "--set", "screen.method=toy"))["plan"]["stages"]
        assert plan["screen"]["work"]
    finally:
        del METHODS["toy"], ROW_SCORES["toy"]
