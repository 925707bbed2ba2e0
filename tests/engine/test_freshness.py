"""The planner by a table: change X, and exactly these stages go stale, for these reasons."""

import json
import shutil
from pathlib import Path

import pytest

from arisk.base.errors import NewerFormatError
from arisk.catalogue import catalogue
from arisk.config.plan import Config
from arisk.engine.fingerprints import DigestCache, input_fingerprints
from arisk.engine.freshness import plan
from arisk.engine.rundir import RunDir

ALL = list(catalogue().names)


@pytest.fixture
def world(tmp_path):
    """A run directory with every stage committed, and the values its config was made of."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("safety", "finetune", "control", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    values = {
        "model": {"path": str(tmp_path / "model")},
        **{name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("safety", "finetune", "control")},
        "verify": {"safety": {"path": str(tmp_path / "heldout.jsonl")}},
    }
    rundir = RunDir(tmp_path / "run")
    for name in catalogue().ordered(ALL):
        commit(name, values, rundir)
    return tmp_path, values, rundir


def commit(name, values, rundir, **asked):
    """Write a stage as if it had been run."""
    state = next(state for state in states(values, rundir, **asked) if state.stage == name)
    with rundir.lock("test"):
        work = rundir.workspace(name, state.key)
        (work / "out.txt").write_text(name)
        rundir.commit(name, key=state.key, ingredients=state.ingredients, workspace=work, seconds=0.1)


def states(values, rundir, **asked):
    config = Config.model_validate(values)
    inputs = input_fingerprints(config, DigestCache(rundir.path / ".digests.json"))
    return plan(catalogue(), config, inputs, rundir, **asked)


def stale(values, rundir):
    return {state.stage for state in states(values, rundir) if not state.fresh}


def first_stale(values, rundir):
    """In the order in which stages are made."""
    found = {state.stage: state for state in states(values, rundir)}
    return next(found[name] for name in catalogue().ordered(ALL) if not found[name].fresh)


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
    assert not stale(values, rundir)


AFTER_SCORE = ["score", "forecast", "report"]
AFTER_ROLLOUT = ["rollout", "forecast", "verify", "screen", "guard", "report"]
BOTH = ["score", *AFTER_ROLLOUT]


@pytest.mark.parametrize(
    ("dotted", "value", "expected"),
    [
        ("training.learning_rate", 1e-3, AFTER_ROLLOUT),
        ("training.schedule", "cosine", AFTER_ROLLOUT),
        ("training.max_steps", 77, AFTER_ROLLOUT),
        ("training.epochs", 2.0, AFTER_ROLLOUT),
        ("training.max_grad_norm", 0.5, AFTER_ROLLOUT),
        ("training.loss", "rows", BOTH),
        ("training.schedule_args", {"num_cycles": 2}, AFTER_ROLLOUT),
        ("rollout.segments", 3, ["rollout", "forecast", "screen", "report"]),
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
        (
            "collect.chunk_size",
            4,
            [name for name in ALL if name not in ("rollout", "verify", "screen", "guard")],
        ),
        ("verify.safety.max_length", 64, ["verify", "guard", "report"]),
        ("behaviour.prompts", 3, ["rollout", "forecast", "verify", "report"]),
        ("behaviour.ordinary_prompts", 3, ["rollout", "forecast", "verify", "report"]),
        ("behaviour.tokens", 3, ["rollout", "forecast", "verify", "report"]),
        ("behaviour.opening_tokens", 3, ["rollout", "forecast", "verify", "report"]),
        ("behaviour.judge", {"path": "judge"}, ["forecast", "report"]),
        ("forecast.refusals_lost", 0.2, ["forecast", "report"]),
        ("verify.control_samples", 3, ["verify", "report"]),
        ("behaviour.refusal_openings", ["nay"], ["forecast", "report"]),
        ("verify.steps", 7, []),
        ("screen.drop", 0.1, ["screen", "report"]),
        ("screen.rise", 0.05, ["screen", "report"]),
        ("guard.methods", ["replay"], ["guard", "report"]),
        ("guard.replay.strengths", [1.0], ["guard", "report"]),
        ("guard.calibration_steps", 3, ["guard", "report"]),
        ("guard.wanted_drift", 0.2, ["report"]),
        ("guard.steps", 7, []),
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
    assert stale(found, rundir) == set(expected)
    if expected:
        first = first_stale(found, rundir)
        assert any(dotted.split(".")[0] in reason.path or reason.kind == "seed" for reason in first.reasons)


@pytest.mark.parametrize(
    ("file", "expected", "kind"),
    [
        ("safety.jsonl", ALL, "input"),
        ("finetune.jsonl", BOTH, "input"),
        ("control.jsonl", BOTH, "input"),
        ("model/config.json", ALL, "input"),
        ("heldout.jsonl", ["verify", "guard", "report"], "input"),
    ],
)
def test_a_changed_file_makes_exactly_these_stale(world, file, expected, kind):
    folder, values, rundir = world
    (folder / file).write_text("other")
    assert stale(values, rundir) == set(expected)
    first = first_stale(values, rundir)
    assert {reason.kind for reason in first.reasons} == {kind}


def test_moving_a_file_changes_nothing(world):
    folder, values, rundir = world
    (folder / "moved.jsonl").write_text("safety")
    assert stale(changed(values, "safety.path", str(folder / "moved.jsonl")), rundir) == set()


def test_same_content_written_again_changes_nothing(world):
    folder, values, rundir = world
    (folder / "safety.jsonl").write_text("safety")
    assert not stale(values, rundir)


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
    assert {name for name in ALL if not found[name].fresh} == set(AFTER_SCORE)
    assert found["score"].reasons[0].kind == "damaged"
    assert [reason.kind for reason in found["forecast"].reasons] == ["upstream"]
    assert sentences(found.values(), "forecast") == ["score is not fresh"]


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
    empty = plan(catalogue(), Config.model_validate(values), {}, RunDir(Path("does-not-exist")))
    assert all(state.reasons[0].sentence() == "not run yet" for state in empty)


def test_a_stage_that_has_not_run_is_not_said_to_have(world):
    _, values, rundir = world
    found = states(changed(values, "training.learning_rate", 0.5), rundir)
    assert sentences(found, "forecast")[-1] == "rollout is not fresh"
    assert not any("run again" in said for state in found for said in sentences(found, state.stage))
    commit("rollout", changed(values, "training.learning_rate", 0.5), rundir)
    found = states(changed(values, "training.learning_rate", 0.5), rundir)
    assert "rollout was run again" in sentences(found, "forecast")


def sentences(found, stage):
    return [reason.sentence() for state in found if state.stage == stage for reason in state.reasons]


def test_an_optional_stage_makes_stale_only_what_shows_it(world):
    _, values, rundir = world
    shutil.rmtree(rundir.stage_dir("verify"))
    found = states(values, rundir)
    assert [state.stage for state in found if not state.fresh] == ["verify", "report"]
    assert sentences(found, "verify") == ["not run yet"]
    assert sentences(found, "report") == ["verify is not fresh"]
    commit("report", values, rundir)
    assert stale(values, rundir) == {"verify"}
    commit("verify", values, rundir)
    found = states(values, rundir)
    assert [state.stage for state in found if not state.fresh] == ["report"]
    assert sentences(found, "report") == ["verify has been run"]
    commit("report", values, rundir)
    assert not stale(values, rundir)


def test_a_truth_belongs_to_its_plan_again_when_the_plan_comes_back(world):
    _, values, rundir = world
    other = changed(values, "training.learning_rate", 0.5)
    for name in ("rollout", "forecast", "report"):
        commit(name, other, rundir)
    assert stale(other, rundir) == {"verify", "screen", "guard"}
    for name in ("rollout", "forecast"):
        commit(name, values, rundir)
    assert stale(values, rundir) == {"report"}


@pytest.mark.parametrize(
    ("stored", "wanted", "fresh"),
    [
        (None, None, True),
        (None, 50, True),
        (50, 50, True),
        (100, 50, True),
        (50, 100, False),
        (50, None, False),
    ],
)
def test_only_who_asks_for_a_stage_insists_on_its_reach(world, stored, wanted, fresh):
    """A short check belongs to the plan; asked for by name, it must go as far as is wanted."""
    _, values, rundir = world
    was, now = changed(values, "verify.steps", stored), changed(values, "verify.steps", wanted)
    commit("verify", was, rundir, asked="verify", force=True)
    commit("report", was, rundir)
    assert stale(was, rundir) == stale(now, rundir) == set()
    asked = {state.stage: state for state in states(now, rundir, asked="verify")}
    assert asked["verify"].fresh is fresh
    if not fresh:
        assert sentences(asked.values(), "verify") == [f"verify.steps: {stored} → {wanted}"]
        assert not asked["report"].fresh
    forced = {state.stage: state for state in states(now, rundir, asked="verify", force=True)}
    assert forced["verify"].ingredients["config"]["verify.steps"] == wanted
    # Whatever else has changed, the stage that runs is the one that was asked for.
    other = {s.stage: s for s in states(changed(now, "run.seed", 3), rundir, asked="verify")}
    assert other["verify"].ingredients["config"]["verify.steps"] == wanted
