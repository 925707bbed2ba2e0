"""A run directory that somebody else has had his hands on: nothing is believed, followed or lost."""

import json
import os
import shutil
import stat

import pytest
import torch

from arisk.base.artifacts import write_tensors, write_text
from arisk.base.errors import ArtifactError, ConfigError
from arisk.catalogue import catalogue
from arisk.config.plan import Config
from arisk.engine.fingerprints import DigestCache, stage_key
from arisk.engine.freshness import made_from, status_rows
from arisk.engine.run import run_stages
from arisk.engine.rundir import RunDir

INGREDIENTS = {"config": {"rate": 1.0}}
KEY = stage_key(INGREDIENTS)


@pytest.fixture
def rundir(tmp_path):
    """A run with the stage collect."""
    made = RunDir(tmp_path / "run")
    with made.lock("test"):
        commit(made)
    return made


def commit(rundir, text="one"):
    work = rundir.workspace("collect", KEY)
    (work / "out.txt").write_text(text)
    (work / "more").mkdir(exist_ok=True)
    (work / "more" / "shard.txt").write_text(text)
    rundir.commit("collect", key=KEY, ingredients=INGREDIENTS, workspace=work, seconds=1.0)


def edited(rundir, change):
    path = rundir.stage_dir("collect") / "manifest.json"
    body = json.loads(path.read_text())
    change(body)
    path.write_text(json.dumps(body))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m["ingredients"]["config"].update(rate=2.0), "does not follow from its ingredients"),
        (lambda m: m.update(key="0" * 64), "does not follow"),
        (lambda m: m.update(outputs={}), "lists no file"),
        (lambda m: m.update(outputs=[]), "lacks ingredients or outputs"),
        (lambda m: m.update(ingredients=None), "lacks ingredients or outputs"),
        (lambda m: m.update(outputs={"../config.yaml": {"bytes": 1, "sha256": ""}}), "is none"),
        (lambda m: m["outputs"].update({"out.txt": {"bytes": "3"}}), "lacks size or digest"),
        (lambda m: m.update(stage="score"), "is of the stage 'score'"),
        (lambda m: m.pop("seconds"), "lacks the time"),
        (lambda m: m.update(format_version=True), "format_version"),
    ],
)
def test_an_edited_manifest_is_damage(rundir, change, says):
    edited(rundir, change)
    with pytest.raises(ArtifactError, match=says):
        rundir.manifest("collect")


@pytest.mark.parametrize("name", ["out.txt", "more/shard.txt"])
def test_every_file_is_listed_and_every_listed_file_there(rundir, name):
    edited(rundir, lambda m: m["outputs"].pop(name))
    with pytest.raises(ArtifactError, match="not one that the stage wrote") as caught:
        rundir.verify("collect", deep=False)
    assert name in caught.value.where


def test_a_file_too_many_is_named(rundir):
    (rundir.stage_dir("collect") / "more" / "new.txt").write_text("x")
    with pytest.raises(ArtifactError, match="not one that the stage wrote"):
        rundir.verify("collect", deep=False)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_text("[" * 100_000),
        lambda path: path.write_text("9" * 6000),
        lambda path: path.write_bytes(b"\xff\xfe{}"),
        lambda path: path.write_text(""),
        lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to(path)),
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
        lambda path: os.truncate(path, 1 << 40),
    ],
    ids=["nested", "digits", "bytes", "empty", "device", "pipe", "folder", "circle", "nowhere", "huge"],
)
def test_json_is_read_from_files_of_bounded_size_alone(rundir, harm):
    path = rundir.stage_dir("collect") / "manifest.json"
    harm(path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        rundir.manifest("collect")


@pytest.mark.parametrize("text", ["[]", '{"x": 1}', '{"x": [1, 2, 3, 4]}', '{"x": null}', "{", "[" * 9999])
def test_a_cache_of_digests_is_never_the_truth(tmp_path, text):
    file, cache = tmp_path / "x", tmp_path / "cache.json"
    file.write_text("content")
    cache.write_text(text.replace('"x"', json.dumps(str(file))))
    digest = DigestCache(cache).digest(file)
    assert digest == DigestCache(tmp_path / "none").digest(file)


def test_a_lock_that_was_removed_ends_the_run_before_it_commits(rundir):
    with rundir.lock("first"), pytest.raises(ArtifactError, match="removed or taken"):
        (rundir.path / ".lock").unlink()
        commit(rundir, "two")
    assert (rundir.stage_dir("collect") / "out.txt").read_text() == "one"


def test_a_second_writer_that_got_in_is_not_overwritten(rundir):
    second = RunDir(rundir.path)
    with rundir.lock("first"):
        (rundir.path / ".lock").unlink()
        with second.lock("second"):
            with pytest.raises(ArtifactError, match="removed or taken"):
                commit(rundir, "two")
            commit(second, "three")
            assert "second" in second._holder()
    assert (rundir.stage_dir("collect") / "out.txt").read_text() == "three"


@pytest.mark.parametrize("name", ["collect", ".partial", ".lock", ".trash-collect", "config.yaml"])
def test_links_in_a_run_directory_are_refused_and_nothing_behind_them_touched(rundir, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    for folder in ("report-abc", "collect-abc"):
        (outside / folder).mkdir()
        (outside / folder / "precious").write_text("x")
    place = rundir.path / name
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.symlink_to(outside)
    with pytest.raises(ArtifactError, match="is a link"), rundir.lock("test"):
        pass
    assert len(list(outside.rglob("precious"))) == 2


def test_links_in_a_workspace_are_removed_and_not_followed(rundir, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    partial = rundir.path / ".partial"
    partial.mkdir()
    (partial / "collect-other").symlink_to(outside)
    (partial / f"collect-{KEY[:16]}").mkdir()
    (partial / f"collect-{KEY[:16]}" / "parts").symlink_to(outside)
    with rundir.lock("test"):
        work = rundir.workspace("collect", KEY)
        assert list(work.iterdir()) == []
        (work / "late").symlink_to(outside / "precious")
        with pytest.raises(ArtifactError, match="link"):
            rundir.commit("collect", key=KEY, ingredients=INGREDIENTS, workspace=work, seconds=1.0)
    assert (outside / "precious").read_text() == "x"
    assert not (partial / "collect-other").is_symlink()


def test_what_is_written_replaces_a_link_in_its_way(tmp_path):
    (tmp_path / "precious").write_text("x")
    for name in ("record.json.partial", "tensors.safetensors.partial"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_text(tmp_path / "record.json", "{}")
    write_tensors(tmp_path / "tensors.safetensors", {"a": torch.ones(1)})
    assert (tmp_path / "precious").read_text() == "x"


def test_what_says_that_tensors_are_whole_goes_before_them(rundir, monkeypatch):
    removed = []
    unlink = type(rundir.path).unlink
    monkeypatch.setattr(
        type(rundir.path), "unlink", lambda path, **given: (removed.append(path.name), unlink(path, **given))
    )
    with rundir.lock("test"):
        work = rundir.workspace("collect", KEY)
        for name in ("arm/a.safetensors", "arm/record.json", "arm/z.safetensors", "out.txt"):
            write_text(work / name, "x")
        rundir.commit(
            "collect", key=KEY, ingredients=INGREDIENTS, workspace=work, seconds=1.0, leave_out=["arm/*"]
        )
    names = [name for name in removed if name in ("a.safetensors", "record.json", "z.safetensors")]
    assert names == ["record.json", "a.safetensors", "z.safetensors"]


def test_from_a_stage_behind_the_last_one_is_a_slip(tmp_path):
    config = Config.model_validate({"model": {"path": "x"}, "safety": "x", "finetune": "x"})
    with pytest.raises(ConfigError, match="report comes after collect"):
        run_stages(
            catalogue(),
            config,
            run_dir=tmp_path / "run",
            show=None,
            command="",
            first="report",
            last="collect",
        )
    assert not (tmp_path / "run").exists()


@pytest.fixture
def reported(tmp_path):
    """A run whose report was made from its forecast; what the report says is no matter here."""
    rundir = RunDir(tmp_path / "run")
    with rundir.lock("test"):
        rundir.write("config.yaml", "{}")
        keys = {}
        for stage in map(catalogue().get, ("forecast", "report")):
            ingredients = {"stage_version": stage.version, "upstream": dict(keys)}
            keys[stage.name] = stage_key(ingredients)
            work = rundir.workspace(stage.name, keys[stage.name])
            write_text(work / "summary.json", json.dumps({"format_version": 1, "verdict": {"level": "low"}}))
            rundir.commit(
                stage.name, key=keys[stage.name], ingredients=ingredients, workspace=work, seconds=1.0
            )
    return rundir


def another_forecast(rundir):
    ingredients = {"stage_version": 1, "upstream": {}}
    with rundir.lock("test"):
        work = rundir.workspace("forecast", stage_key(ingredients))
        write_text(work / "x", "x")
        rundir.commit(
            "forecast", key=stage_key(ingredients), ingredients=ingredients, workspace=work, seconds=1.0
        )


def of_another_version(rundir):
    path = rundir.path / "report" / "manifest.json"
    body = json.loads(path.read_text())
    body["ingredients"]["stage_version"] += 1
    path.write_text(json.dumps({**body, "key": stage_key(body["ingredients"])}))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda run: (run.path / "report" / "summary.json").write_text("{}"), "not what the stage wrote"),
        (lambda run: shutil.rmtree(run.path / "report"), "has not been run here"),
        (lambda run: (run.path / "report" / "manifest.json").unlink(), "has not been run here"),
        (another_forecast, "forecast was run again since"),
        (of_another_version, "is of version"),
    ],
)
def test_a_model_card_is_made_of_what_belongs_together(arisk, reported, harm, says):
    made_from(reported, catalogue().get("report"), reads=["forecast"])
    harm(reported)
    code, out, err = arisk("card", reported.path)
    assert (code, out) == (4, "")
    assert says in err


@pytest.mark.parametrize("there", ["/dev/null", "/dev/null/run", "file"])
def test_something_else_in_the_place_of_a_run_directory_is_named(tmp_path, there):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="in the way"), RunDir(tmp_path / there).lock("test"):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_of_both_kinds_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.json", "{}")
        write_tensors(tmp_path / "b.safetensors", {"a": torch.ones(1)})
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


def test_status_leaves_a_folder_that_is_no_run_as_it_is(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    rows = str(tmp_path / "rows.jsonl")
    config = Config.model_validate(
        {"model": {"path": str(tmp_path / "model")}, "safety": rows, "finetune": rows}
    )
    status_rows(catalogue(), config, tmp_path / "model")
    assert list((tmp_path / "model").iterdir()) == []
