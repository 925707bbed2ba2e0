"""What goes stale and why, and stages taken from another run."""

import json
import os
import shutil
from pathlib import Path

import pytest

from arisk.base.errors import ArtifactError, NewerFormatError
from arisk.base.terminal import StageDisplay
from arisk.catalogue import catalogue
from arisk.config.plan import Config
from arisk.engine.fingerprints import DigestCache, input_fingerprints
from arisk.engine.freshness import StageState, check_run_dir, plan, stage_key, take
from arisk.engine.run import run_stages
from arisk.engine.rundir import RunDir
from arisk.engine.stage import Catalogue, Stage

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
        ("behaviour.prompts", 3, ["rollout", "forecast", "verify", "screen", "report"]),
        ("behaviour.ordinary_prompts", 3, ["rollout", "forecast", "verify", "report"]),
        ("behaviour.tokens", 3, ["rollout", "forecast", "verify", "screen", "report"]),
        ("behaviour.opening_tokens", 3, ["rollout", "forecast", "verify", "screen", "report"]),
        ("behaviour.judge", {"path": "judge"}, ["forecast", "screen", "guard", "report"]),
        ("forecast.refusals_lost", 0.2, ["forecast", "report"]),
        ("verify.control_samples", 3, ["verify", "report"]),
        ("behaviour.refusal_openings", ["nay"], ["forecast", "screen", "guard", "report"]),
        ("verify.steps", 7, []),
        ("screen.drop", 0.1, ["screen", "report"]),
        ("screen.rise", 0.05, ["screen", "report"]),
        ("screen.score", "path", ["screen", "report"]),
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
    assert sentences(found.values(), "forecast") == ["score is not up to date"]


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
    assert sentences(found, "forecast")[-1] == "rollout is not up to date"
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
    assert sentences(found, "report") == ["verify is not up to date"]
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


INGREDIENTS = {"stage": "collect", "config": {"a": 1}}
STATE = StageState("collect", False, (), stage_key(INGREDIENTS), INGREDIENTS)


@pytest.fixture
def runs(tmp_path):
    """A run that has the stage, and one that has not."""
    source, target = RunDir(tmp_path / "source"), RunDir(tmp_path / "target")
    target.path.mkdir()
    with source.lock("test"):
        work = source.workspace("collect", STATE.key)
        (work / "gradients").mkdir()
        (work / "gradients" / "shard.bin").write_bytes(os.urandom(4096))
        (work / "record.json").write_text("{}")
        source.commit("collect", key=STATE.key, ingredients=INGREDIENTS, workspace=work, seconds=7.5)
    return source, target


def files(rundir):
    folder = rundir.stage_dir("collect")
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_the_stage_is_taken_whole_and_the_source_left_alone(runs):
    source, target = runs
    before = files(source)
    assert take(target, STATE, [source.path]) == source.path
    assert files(source) == before
    taken = files(target)
    assert {name: body for name, body in taken.items() if name != "manifest.json"} == {
        name: body for name, body in before.items() if name != "manifest.json"
    }
    target.verify("collect", deep=True)
    manifest = target.manifest("collect")
    assert (manifest["key"], manifest["seconds"]) == (STATE.key, 7.5)
    assert manifest["taken_from"] == str(source.path)
    assert not (target.path / ".partial").exists()


def test_removing_the_source_leaves_the_taker_whole(runs):
    source, target = runs
    take(target, STATE, [source.path])
    shutil.rmtree(source.path)
    target.verify("collect", deep=True)


def test_where_links_are_not_possible_files_are_copied(runs, monkeypatch):
    source, target = runs

    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert take(target, STATE, [source.path])
    shard = "gradients/shard.bin"
    inodes = {run.stage_dir("collect").joinpath(shard).stat().st_ino for run in runs}
    assert len(inodes) == 2
    target.verify("collect", deep=True)


def damaged(source):
    file = source.stage_dir("collect") / "gradients" / "shard.bin"
    body = bytearray(file.read_bytes())
    body[100] ^= 1
    file.write_bytes(bytes(body))


def truncated(source):
    file = source.stage_dir("collect") / "gradients" / "shard.bin"
    file.write_bytes(file.read_bytes()[:10])


def incomplete(source):
    (source.stage_dir("collect") / "record.json").unlink()


def manifest_gone(source):
    (source.stage_dir("collect") / "manifest.json").unlink()


def rewritten(source, **changes):
    path = source.stage_dir("collect") / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def other_key(source):
    rewritten(source, key="0" * 64)


def newer(source):
    rewritten(source, format_version=99)


def no_outputs(source):
    rewritten(source, outputs={})


def outside(source):
    (source.path / "secret").write_text("x")
    rewritten(source, outputs={"../secret": {"bytes": 1, "sha256": "0"}})


@pytest.mark.parametrize(
    "harm", [damaged, truncated, incomplete, manifest_gone, other_key, newer, no_outputs, outside]
)
def test_what_is_damaged_or_another_stage_is_not_taken_and_costs_nothing(runs, harm):
    source, target = runs
    harm(source)
    work = target.workspace("collect", STATE.key)
    (work / "part").write_text("from a killed run")
    assert take(target, STATE, [source.path]) is None
    assert not target.stage_dir("collect").exists()
    assert (work / "part").exists()
    assert [path.name for path in (target.path / ".partial").iterdir()] == [work.name]


def test_the_next_source_is_asked_where_one_is_damaged(runs, tmp_path):
    source, target = runs
    shutil.copytree(source.path, tmp_path / "good")
    damaged(source)
    assert take(target, STATE, [tmp_path / "nowhere", source.path, target.path, tmp_path / "good"])
    assert target.manifest("collect")["taken_from"] == str(tmp_path / "good")


def test_what_a_killed_run_left_is_cleared_once_the_stage_is_taken(runs):
    source, target = runs
    (target.workspace("collect", STATE.key) / "part").write_text("x")
    left = target.path / ".partial" / "taken-collect"
    left.mkdir()
    (left / "stray").write_text("of a take that was killed")
    assert take(target, STATE, [source.path])
    assert "stray" not in files(target)
    assert not (target.path / ".partial").exists()


def writes(job, folder):
    (folder / "made").write_text("x")


def test_a_report_is_never_taken(tmp_path):
    folders = [tmp_path / name for name in ("first", "second")]
    stages = Catalogue([Stage("a", 1, "", writes), Stage("b", 1, "", writes, reusable=False)])
    config = Config.model_validate({"model": {"source": "python", "entry": f"{__file__}:nothing"}})
    first = run_stages(stages, config, run_dir=folders[0], show=StageDisplay(quiet=True), command="x")
    second = run_stages(
        stages, config, run_dir=folders[1], show=StageDisplay(quiet=True), command="x", reuse=[folders[0]]
    )
    assert first.ran == ("a", "b")
    assert second.ran == ("b",)
    assert second.taken == {"a": str(folders[0])}
    assert not catalogue().get("report").reusable


def test_what_is_no_run_directory_is_told(runs, tmp_path):
    source, _ = runs
    for path, what in [
        (tmp_path / "nowhere", "no such run directory"),
        (source.stage_dir("collect"), "the stage collect of a run"),
        (tmp_path, "not a run directory"),
    ]:
        with pytest.raises(ArtifactError, match=what):
            check_run_dir(path)
