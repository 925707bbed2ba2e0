import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from arisk.base.errors import ArtifactError
from arisk.engine.fingerprints import stage_key
from arisk.engine.run import RESUME_FILES
from arisk.engine.rundir import RunDir


def ingredients(name):
    """Ingredients, and the key that follows from them."""
    return {"name": name}, stage_key({"name": name})


def commit(rundir, stage="collect", key="k1", text="one"):
    given, key = ingredients(key)
    work = rundir.workspace(stage, key)
    (work / "out.txt").write_text(text)
    (work / "losses-0.safetensors").write_text("resume only")
    rundir.commit(
        stage, key=key, ingredients=given, workspace=work, seconds=1.0, leave_out=("losses-*.safetensors",)
    )


def test_commit_moves_the_workspace_and_records_digests(tmp_path):
    rundir = RunDir(tmp_path)
    commit(rundir)
    manifest = rundir.manifest("collect")
    assert manifest is not None
    assert next(iter(manifest)) == "format_version"
    assert list(manifest["outputs"]) == ["out.txt"]
    rundir.verify("collect", deep=True)
    assert not (tmp_path / ".partial").exists()


def test_what_a_killed_process_left_half_written_is_in_no_stage(tmp_path):
    rundir = RunDir(tmp_path)
    given, key = ingredients("k1")
    work = rundir.workspace("collect", key)
    (work / "gradients").mkdir()
    for name in ("gradients/shard-0.safetensors", "gradients/shard-1.safetensors.partial", "out.txt.partial"):
        (work / name).write_text("x")
    rundir.commit("collect", key=key, ingredients=given, workspace=work, seconds=1.0, leave_out=RESUME_FILES)
    assert list(rundir.manifest("collect")["outputs"]) == ["gradients/shard-0.safetensors"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_second_commit_replaces_the_first(tmp_path):
    rundir = RunDir(tmp_path)
    commit(rundir)
    commit(rundir, key="k2", text="two")
    assert (tmp_path / "collect" / "out.txt").read_text() == "two"
    assert not list(tmp_path.glob(".trash*"))


def test_workspace_is_found_again_by_key_only(tmp_path):
    rundir = RunDir(tmp_path)
    (rundir.workspace("collect", "k1") / "shard").write_text("x")
    assert (rundir.workspace("collect", "k1") / "shard").exists()
    assert not list(rundir.workspace("collect", "k2").iterdir())
    assert not list((tmp_path / ".partial").glob("collect-k1*"))


def test_the_next_writer_takes_away_an_empty_folder_of_work(tmp_path):
    rundir = RunDir(tmp_path)
    commit(rundir)
    (tmp_path / ".partial").mkdir()  # A crash between the last rename and the tidying.
    with rundir.lock("a command"):
        assert not (tmp_path / ".partial").exists()
        work = rundir.workspace("score", "k2")
        (work / "state").write_text("half")
    with rundir.lock("a command"):
        assert (work / "state").read_text() == "half"


@pytest.mark.parametrize("text", ["onf", "one and more", None])
def test_verify_names_the_damaged_file(tmp_path, text):
    rundir = RunDir(tmp_path)
    commit(rundir)
    file = tmp_path / "collect" / "out.txt"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(ArtifactError) as caught:
        rundir.verify("collect", deep=False)
    assert caught.value.where == str(file)
    assert "--from collect" in caught.value.fix


CHILD = """
import os, signal, sys
from pathlib import Path
import arisk.engine.rundir as module
from arisk.engine.rundir import RunDir
rundir = RunDir(Path(sys.argv[1]))
point = sys.argv[2]
real = module.shutil.rmtree
real_rename = Path.rename
calls = []
def rename(self, target):
    calls.append(self.name)
    if point == "first rename" or (point == "second rename" and len(calls) == 2):
        os.kill(os.getpid(), signal.SIGKILL)
    return real_rename(self, target)
def text(path, body):
    if point == "manifest": os.kill(os.getpid(), signal.SIGKILL)
    path.write_text(body)
Path.rename = rename
if point == "manifest": module.write_text = text
work = rundir.workspace("collect", "k2")
(work / "out.txt").write_text("two")
rundir.commit("collect", key="k2", ingredients={}, workspace=work, seconds=1.0)
"""


@pytest.mark.parametrize("point", ["manifest", "first rename", "second rename"])
def test_a_kill_inside_commit_leaves_the_old_stage(tmp_path, point):
    rundir = RunDir(tmp_path)
    commit(rundir)
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path), point], check=False)
    assert done.returncode == -signal.SIGKILL
    with rundir.lock("next run"):
        manifest = rundir.manifest("collect")
        assert manifest is not None
        assert manifest["key"] == ingredients("k1")[1]
        rundir.verify("collect", deep=True)


def test_two_writers(tmp_path):
    code = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from arisk.engine.rundir import RunDir
        with RunDir(Path({str(tmp_path)!r})).lock("arisk run other.yaml"):
            print("held", flush=True)
            time.sleep(60)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    try:
        with (
            pytest.raises(ArtifactError, match="another run is writing here") as caught,
            RunDir(tmp_path).lock("x"),
        ):
            pass
        assert f"process {child.pid}" in caught.value.what
        assert "arisk run other.yaml" in caught.value.what
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    with RunDir(tmp_path).lock("a killed holder does not block"):
        pass


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ArtifactError, match="finished stages are kept"), RunDir(path).lock("x"):
            pass


def test_a_read_only_folder(tmp_path, monkeypatch):
    """Root may write anywhere, so the system's answer is put in its place."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ArtifactError, match="cannot be written") as caught, RunDir(tmp_path).lock("x"):
        pass
    assert caught.value.exit_code == 4


def test_damaged_manifest_is_an_error(tmp_path):
    rundir = RunDir(tmp_path)
    commit(rundir)
    (tmp_path / "collect" / "manifest.json").write_text(json.dumps({"format_version": "x"}))
    with pytest.raises(ArtifactError, match="format_version"):
        rundir.manifest("collect")
