"""A stage is taken from another run directory whole and undamaged, or not at all."""

import json
import os
import shutil

import pytest

from arisk.base.errors import ArtifactError
from arisk.base.terminal import StageDisplay
from arisk.catalogue import catalogue
from arisk.config.plan import Config
from arisk.engine.freshness import StageState, check_run_dir, stage_key, take
from arisk.engine.run import run_stages
from arisk.engine.rundir import RunDir
from arisk.engine.stage import Catalogue, Stage

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
