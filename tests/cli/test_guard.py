"""`arisk guard` through the command: table, JSON, staleness, kill -9 and resume, report section."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arisk.base.artifacts import read_record
from arisk.config.names import METHODS
from arisk.guard.choice import forecast_task_cost
from arisk.guard.record import GuardResult
from tests.cli.test_cli import environment
from tests.cli.test_verify import TASK

SETTINGS = ["guard.methods=[replay,ewc,alignguard,projection]", "guard.calibration_steps=3"]


def arguments(*extra):
    return [part for item in (*SETTINGS, *extra) for part in ("--set", item)]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    (folder / "tasks.py").write_text(TASK)
    path = folder / "c.yaml"
    path.write_text(
        f"model: {{source: python, entry: '{folder}/tasks.py:make'}}\n"
        "training: {max_steps: 24, learning_rate: 0.05}\n"
        "score: {batches: 2, hvp_batches: 1, nulls: 3, examples: 4, probe_points: 2}\n"
    )
    return path


@pytest.fixture
def arisk(arisk, config):
    """The command on these settings."""

    def call(verb, folder, *extra, settings=()):
        return arisk(verb, config, "--run-dir", folder, *extra, *arguments(*settings))

    return call


@pytest.fixture(scope="module")
def guarded(config):
    """A guarded plan without a forecast."""
    folder = config.parent / "guarded"
    command = [sys.executable, "-m", "arisk", "guard", str(config), "--run-dir", str(folder), *arguments()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    return folder, done.stdout


def test_the_table_names_every_arm_and_what_the_report_waits_for(guarded):
    _, out = guarded
    for label in (
        "plain",
        "replay 0.3",
        "ewc 10",
        "ewc after 1.5",
        "alignguard as given",
        "projection conflict",
    ):
        assert sum(line[2:].startswith(f"{label} ") for line in out.splitlines()) == 1
    assert "no report: stage rollout is not up to date; next: arisk run" in out.splitlines()[-1]
    assert "caveat: No control data" in out


def test_a_second_time_does_nothing(arisk, guarded, monkeypatch):
    monkeypatch.setattr("arisk.models.load_task", lambda *a, **k: pytest.fail("the model was loaded"))
    code, out, _ = arisk("guard", guarded[0], "--json")
    body = json.loads(out, parse_constant=pytest.fail)
    assert code == 0
    assert body["ran"] is False
    assert body["guard"]["arms"][0]["label"] == "plain"
    assert body["guard"]["arms"][0]["drift_share"] in (1.0, None)


def test_limits_need_no_new_fine_tune(arisk, guarded, tmp_path, monkeypatch):
    folder = shutil.copytree(guarded[0], tmp_path / "run")
    monkeypatch.setattr("arisk.models.load_task", lambda *a, **k: pytest.fail("the model was loaded"))
    settings = [
        "guard.tolerated_task_loss=100",
        "guard.wanted_drift=0.999",
        "forecast.collapse_threshold=1e-9",
    ]
    body = json.loads(arisk("guard", folder, "--json", settings=settings)[1])["guard"]
    assert body["rule"] == "met"
    best = min((arm for arm in body["arms"][1:]), key=lambda arm: arm["safety"])
    assert body["recommended"] == best["label"]


def test_the_report_shows_it(arisk, guarded, tmp_path):
    folder = shutil.copytree(guarded[0], tmp_path / "run")
    assert arisk("run", folder)[0] == 0
    page = (folder / "report" / "report.html").read_text()
    for part in ('id="guard"', 'id="fig-guard-pareto"', 'id="fig-guard-curves"', "Protected fine-tunes"):
        assert part in page
    body = json.loads((folder / "report" / "summary.json").read_text(), parse_constant=pytest.fail)["guard"]
    assert body["sentence"] in (folder / "report" / "summary.md").read_text()
    assert {arm["label"] for arm in body["arms"]} >= {"plain", "replay 0.1"}
    code, out, _ = arisk("guard", folder)
    assert code == 0
    assert out.splitlines()[-1] == f"report: {folder / 'report' / 'report.html'}"


def test_a_shorter_reach_is_a_part_of_the_plan(arisk, tmp_path):
    settings = ["guard.methods=[replay]"]
    _, out, _ = arisk("guard", tmp_path / "run", "--all", "--steps", "5", "--json", settings=settings)
    assert json.loads(out)["guard"]["last"] == 5
    assert json.loads(out)["guard"]["horizon"] == 24


def test_a_task_from_python_has_no_model_to_keep(arisk, tmp_path):
    code, _, err = arisk("guard", tmp_path / "run", "--save-model", tmp_path / "kept")
    assert code == 2
    assert "guard.save_model" in err
    assert not (tmp_path / "kept").exists()


def test_mistakes_are_one_clear_error(arisk, tmp_path):
    for settings, code, what in (
        (["guard.methods=[magic]"], 2, "guard.methods"),
        (["guard.replay.strengths=[-1]"], 2, "guard.replay.strengths"),
        (["guard.strength=3"], 2, "guard.strength"),
        (["guard.task={path: x.jsonl}"], 2, "Task.clean"),
        (["guard.ewc.temperature=3"], 2, "temperature"),
    ):
        found, _, err = arisk("guard", tmp_path / "run", settings=settings)
        assert found == code, err
        assert what in err
        assert "Traceback" not in err


KILL = """
import os, signal, sys
sys.argv = ["arisk", *sys.argv[1:]]
from arisk.training import state as run_state
run_state.SAVE_EVERY = run_state.SAVE_SHARE = 0
save, turns = run_state.save_state, []
def save_state(folder, run, track, block):
    save(folder, run, track, block)
    turns.append(track.at)
    if len(turns) == 55:
        os.kill(os.getpid(), signal.SIGKILL)
run_state.save_state = save_state
from arisk import cli
cli.main()
"""


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(config, guarded, tmp_path):
    folder = tmp_path / "run"
    common = ["guard", str(config), "--run-dir", str(folder), *arguments()]
    killed = subprocess.run(
        [sys.executable, "-c", KILL, *common], check=False, capture_output=True, env=environment()
    )
    assert killed.returncode == -signal.SIGKILL
    (workspace,) = folder.glob(".partial/guard-*")
    assert len(list(workspace.glob("arm-*/record.json"))) == 2
    assert (workspace / "arm-02" / "state.json").exists()
    subprocess.run(
        [sys.executable, "-m", "arisk", *common], check=True, capture_output=True, env=environment()
    )
    found, want = (read_record(place / "guard", GuardResult) for place in (folder, guarded[0]))
    for one, other in zip(found.arms, want.arms, strict=True):
        assert (one.label, one.safety, one.task, one.final_safety) == (
            other.label,
            other.safety,
            other.task,
            other.final_safety,
        )
        assert repr(one.terms) == repr(other.terms)
    assert {path.name for path in (folder / "guard").iterdir()} == {
        *("tensors.safetensors", "record.json", "manifest.json")
    }


def test_the_embedded_model_runs_every_method(tmp_path):
    """LoRA, held-out rows, control, sampled minibatches: a short plan on the demo's config."""
    demo = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
    short = [
        *("training.max_steps=3", "training.batch_size=2", "safety.max_samples=8", "run.threads=1"),
        *("verify.safety.max_samples=4", "guard.task_samples=4", "guard.control_samples=4"),
        *("guard.alignguard.rank=8", "collect.chunk_size=4", "guard.generate=2", "guard.ordinary=2"),
    ]
    command = [sys.executable, "-m", "arisk", "guard", demo, "--run-dir", str(tmp_path / "run"), "--json"]
    sets = [part for item in short for part in ("--set", item)]
    done = subprocess.run([*command, *sets], check=True, capture_output=True, text=True, env=environment())
    body = json.loads(done.stdout, parse_constant=pytest.fail)["guard"]
    assert body["heldout"] is True
    assert len({arm["label"] for arm in body["arms"]}) == 21
    assert {arm["method"] for arm in body["arms"]} == set(METHODS)
    assert body["ordinary_prompts"] == 2
    assert all(arm["diverged_at"] is None for arm in body["arms"])
    assert "have Fisher 0 and are not guarded" in next(
        arm["note"] for arm in body["arms"] if arm["label"] == "ewc 10"
    )


def test_all_are_forecast_and_the_best_two_trained(tmp_path):
    """The default way, on the embedded model: the others stand there with what chose between them."""
    demo = str(Path(__file__).parents[2] / "configs" / "demo.yaml")
    short = [
        *("training.max_steps=30", "training.batch_size=2", "safety.max_samples=8", "run.threads=1"),
        *("verify.safety.max_samples=4", "guard.task_samples=4", "guard.control_samples=4"),
        *("guard.generate=4", "guard.ordinary=2", "guard.max_new_tokens=8", "guard.methods=[replay,kl]"),
        *(
            "training.learning_rate=5.0e-3",
            "forecast.collapse_threshold=1.0e-6",
            "guard.kl.rows=2",
            "guard.replay.rows=2",
        ),
    ]
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "arisk", "guard", demo, "--run-dir", str(folder)]
    sets = [part for item in short for part in ("--set", item)]
    done = subprocess.run([*command, *sets], check=True, capture_output=True, text=True, env=environment())
    result = read_record(folder / "guard", GuardResult)
    assert [one.label for one in result.forecasts] == ["plain", "replay 0.1", "replay 0.3", "kl 1", "kl 2"]
    chosen = [one.label for one in result.forecasts if one.chosen]
    assert len(chosen) == 2
    assert [arm.label for arm in result.arms] == ["plain", *chosen]
    lines = done.stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if "forecast only (--all trains them)" in line)
    assert lines[header].split()[-5:] == ["openings", "kept", "task", "loss", "safety"]
    for one in result.forecasts[1:]:
        rows = [line.split() for line in lines[header:] if line.startswith(f"  {one.label} ")]
        cost = forecast_task_cost(one, result.forecasts[0], result.plain)
        said = [*one.label.split(), f"{one.kept:.0%}", f"{cost:+.1%}", f"{one.safety:+.3f}"]
        assert rows == ([] if one.chosen else [said])
    assert any(line.startswith("trained are the 2 of 4 arms") for line in lines)
