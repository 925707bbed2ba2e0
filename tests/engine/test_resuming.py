"""What a stopped run left behind is found again, or begun anew; data never lies in a stage's own folder."""

import errno

import pytest
import torch

from arisk.base.artifacts import read_tensors, write_tensors
from arisk.base.errors import ArtifactError, ConfigError, DamagedError
from arisk.config.plan import Config
from arisk.engine.run import _refuse_own_files, run_stages
from arisk.engine.rundir import RunDir
from arisk.engine.stage import Catalogue, Stage
from arisk.screening.stage import KEPT_FILE

CONFIG = {"model": {"source": "python", "entry": "nowhere:make"}}


class Notes:
    """Shows nothing, and keeps what is noted."""

    def __init__(self):
        self.told = []

    def note(self, text):
        self.told.append(text)

    def __getattr__(self, name):
        return lambda *_, **__: None


def went(folder, run, **settings):
    """A catalogue of one stage that does this; what was noted."""
    show = Notes()
    config = Config.model_validate({**CONFIG, **settings})
    catalogue = Catalogue([Stage("work", 1, "", run), Stage("report", 1, "", run)])
    run_stages(
        catalogue, config, run_dir=folder, show=show, command="test", only="work", last="work", upstream=False
    )
    return show.told


def stopped(folder, names):
    """A run that was stopped with these half-written files in its workspace; what it finds, call by call."""
    calls = []

    def run(job, workspace):
        calls.append(sorted(str(f.relative_to(workspace)) for f in workspace.rglob("*") if f.is_file()))
        if len(calls) == 1:
            for name in (*names, "whole.json"):
                (workspace / name).parent.mkdir(exist_ok=True)
                (workspace / name).write_bytes(b"half")
            raise KeyboardInterrupt
        for name in names:
            if (workspace / name).exists():
                read_tensors(workspace / name)

    with pytest.raises(KeyboardInterrupt):
        went(folder, run)
    told = went(folder, run)
    assert (folder / "work" / "manifest.json").exists()
    return calls, told


def test_what_cannot_be_read_is_made_again_and_the_rest_is_kept(tmp_path):
    calls, told = stopped(tmp_path, ["shard.safetensors"])
    assert calls == [[], ["shard.safetensors", "whole.json"], ["whole.json"]]
    assert "work      shard.safetensors cannot be read: shard.safetensors is made again" in told


def test_a_record_that_cannot_be_read_goes_as_a_whole(tmp_path):
    names = ["arm/tensors.safetensors", "other/record.json"]
    calls, told = stopped(tmp_path, names)
    assert calls == [[], [*names, "whole.json"], [names[1], "whole.json"], ["whole.json"]]
    assert [line.partition(": ")[2] for line in told] == ["arm is made again", "other is made again"]


def test_where_a_part_does_not_help_all_is_made_again(tmp_path):
    calls = []

    def run(job, workspace):
        calls.append(sorted(file.name for file in workspace.iterdir()))
        if len(calls) == 1:
            (workspace / "one.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt
        if any(workspace.iterdir()) or len(calls) == 3:
            (workspace / "other").touch()
            read_tensors(workspace / "one.safetensors")

    with pytest.raises(KeyboardInterrupt):
        went(tmp_path, run)
    told = went(tmp_path, run)
    assert calls == [[], ["one.safetensors"], ["other"], []]
    assert told[-1].endswith("all of it is made again")


def test_what_the_system_will_not_read_just_now_is_kept(tmp_path, monkeypatch):
    file = tmp_path / "shard.safetensors"
    write_tensors(file, {"a": torch.ones(2)})

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("arisk.base.artifacts._require_regular", stale)
    with pytest.raises(ArtifactError, match="Stale file handle") as caught:
        read_tensors(file)
    assert not isinstance(caught.value, DamagedError)
    assert "run again" in caught.value.fix


def test_a_stage_that_damages_its_own_files_ends_with_the_way_out(tmp_path):
    def run(job, workspace):
        (workspace / "shard.safetensors").write_bytes(b"half")
        read_tensors(workspace / "shard.safetensors")

    with pytest.raises(DamagedError) as caught:
        went(tmp_path / ".partial" / "runs", run)
    # Only the last folder of that name is the run's.
    assert f"remove {tmp_path}/.partial/runs/.partial/work-" in caught.value.fix
    assert "run the same command again" in caught.value.fix


def test_data_that_the_run_itself_writes_is_refused(tmp_path):
    own = tmp_path / "run" / "work" / KEPT_FILE
    own.parent.mkdir(parents=True)
    own.touch()
    with pytest.raises(ConfigError, match="replaces what is in it") as caught:
        went(tmp_path / "run", lambda *_: None, finetune={"path": str(own)})
    assert caught.value.where.startswith("finetune.path: ")
    assert "--run-dir" in caught.value.fix
    # A stage that is not run writes nothing.
    other = tmp_path / "run" / "report" / KEPT_FILE
    other.parent.mkdir()
    other.touch()
    went(tmp_path / "run", lambda *_: None, finetune={"path": str(other)})


@pytest.mark.parametrize(("place", "refused"), [("work", True), ("work/inside", True), ("beside", False)])
def test_a_model_is_not_kept_where_the_stage_puts_its_files(tmp_path, place, refused):
    config = Config.model_validate({**CONFIG, "verify": {"save_model": str(tmp_path / place)}})
    rundir = RunDir(tmp_path)
    if not refused:
        _refuse_own_files(config, rundir, ["work", "verify"])
        return
    with pytest.raises(ConfigError) as caught:
        _refuse_own_files(config, rundir, ["work", "verify"])
    assert caught.value.where.startswith("verify.save_model: ")
    _refuse_own_files(config, rundir, ["work"])  # Nothing is saved where `verify` is not run.
