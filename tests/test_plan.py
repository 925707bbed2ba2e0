"""The planner by a table: change X, and exactly these stages go stale, for these reasons."""

import json
from pathlib import Path

import pytest

from arisk.config import Config
from arisk.errors import NewerFormatError
from arisk.fingerprints import DigestCache, input_fingerprints
from arisk.plan import STAGES, Reason, plan
from arisk.rundir import RunDir

ALL = [spec.name for spec in STAGES]


@pytest.fixture
def world(tmp_path):
    """A run directory with every stage committed, and the values its config was made of."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("safety", "finetune", "control"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    values = {
        "model": {"path": str(tmp_path / "model")},
        **{name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("safety", "finetune", "control")},
    }
    rundir = RunDir(tmp_path / "run")
    with rundir.lock("test"):
        for state in states(values, rundir):
            work = rundir.workspace(state.stage, state.key)
            (work / "out.txt").write_text(state.stage)
            rundir.commit(
                state.stage, key=state.key, ingredients=state.ingredients, workspace=work, seconds=0.1
            )
    return tmp_path, values, rundir


def states(values, rundir):
    config = Config.model_validate(values)
    inputs = input_fingerprints(config, DigestCache(rundir.path / ".digests.json"))
    return plan(config, inputs, rundir)


def stale(values, rundir):
    return [state.stage for state in states(values, rundir) if not state.fresh]


def changed(values, dotted, value):
    copy = json.loads(json.dumps(values))
    place = copy
    *parents, last = dotted.split(".")
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return copy


def test_nothing_changed_nothing_stale(world):
    _, values, rundir = world
    assert stale(values, rundir) == []


AFTER_SCORE = ["score", "forecast", "report"]
AFTER_ROLLOUT = ["rollout", "forecast", "report"]
BOTH = ["score", *AFTER_ROLLOUT]


@pytest.mark.parametrize(
    ("dotted", "value", "expected"),
    [
        ("training.learning_rate", 1e-3, AFTER_ROLLOUT),
        ("training.schedule", "cosine", AFTER_ROLLOUT),
        ("training.max_steps", 77, AFTER_ROLLOUT),
        ("training.epochs", 2.0, AFTER_ROLLOUT),
        ("training.max_grad_norm", 1.0, AFTER_ROLLOUT),
        ("rollout.segments", 3, AFTER_ROLLOUT),
        ("forecast.collapse_threshold", 0.2, ["forecast", "report"]),
        ("training.optimizer", "sgd", BOTH),
        ("training.batch_size", 4, BOTH),
        ("score.nulls", 3, AFTER_SCORE),
        ("finetune.max_samples", 3, BOTH),
        ("control.max_length", 64, BOTH),
        ("subspace.max_rank", 3, ["subspace", *AFTER_SCORE]),
        ("safety.max_length", 64, ALL),
        ("model.dtype", "bfloat16", ALL),
        ("model.adapter", {"r": 4}, ALL),
        ("collect.chunk_size", 4, [name for name in ALL if name != "rollout"]),
        ("run.seed", 1, ALL),
        ("report.max_examples", 3, ["report"]),
        ("run.device", "cpu", []),
        ("run.threads", 2, []),
        ("run.dir", "elsewhere", []),
        ("collect.memory_budget_gb", 3.0, []),
    ],
)
def test_a_changed_setting_makes_exactly_these_stale(world, dotted, value, expected):
    _, values, rundir = world
    found = changed(values, dotted, value)
    assert stale(found, rundir) == expected
    if expected:
        first = next(state for state in states(found, rundir) if not state.fresh)
        assert any(dotted.split(".")[0] in reason.path or reason.kind == "seed" for reason in first.reasons)


@pytest.mark.parametrize(
    ("file", "expected", "kind"),
    [
        ("safety.jsonl", ALL, "input"),
        ("finetune.jsonl", BOTH, "input"),
        ("control.jsonl", BOTH, "input"),
        ("model/config.json", ALL, "input"),
    ],
)
def test_a_changed_file_makes_exactly_these_stale(world, file, expected, kind):
    folder, values, rundir = world
    (folder / file).write_text("other")
    assert stale(values, rundir) == expected
    first = next(state for state in states(values, rundir) if not state.fresh)
    assert {reason.kind for reason in first.reasons} == {kind}


def test_moving_a_file_changes_nothing(world):
    folder, values, rundir = world
    (folder / "moved.jsonl").write_text("safety")
    assert stale(changed(values, "safety.path", str(folder / "moved.jsonl")), rundir) == []


def test_same_content_written_again_changes_nothing(world):
    folder, values, rundir = world
    (folder / "safety.jsonl").write_text("safety")
    assert stale(values, rundir) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda stage: (stage / "out.txt").write_text("scorx"),
        lambda stage: (stage / "out.txt").unlink(),
        lambda stage: (stage / "manifest.json").write_text("{"),
    ],
)
def test_damage_is_stale_with_its_file(world, damage):
    _, values, rundir = world
    damage(rundir.stage_dir("score"))
    found = {state.stage: state for state in states(values, rundir)}
    assert [name for name in ALL if not found[name].fresh] == AFTER_SCORE
    assert found["score"].reasons[0].kind == "damaged"
    assert found["forecast"].reasons == (Reason("upstream", "score"),)


def test_a_newer_manifest_is_not_overwritten_silently(world):
    _, values, rundir = world
    path = rundir.stage_dir("collect") / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))
    with pytest.raises(NewerFormatError, match="format version 99") as caught:
        states(values, rundir)
    assert caught.value.exit_code == 4


def test_reasons_read_as_sentences(world):
    _, values, rundir = world
    found = states(changed(values, "training.learning_rate", 0.5), rundir)
    forecast = next(state for state in found if state.stage == "forecast")
    assert "training.learning_rate: 0.0002 → 0.5" in forecast.reasons[0].sentence()
    empty = plan(Config.model_validate(values), {}, RunDir(Path("does-not-exist")))
    assert all(state.reasons[0].sentence() == "not run yet" for state in empty)
