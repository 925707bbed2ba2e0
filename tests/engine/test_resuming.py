"""What a stopped run left behind is found again, or begun anew; data never lies in a stage's own folder."""

import pytest

from arisk.base.artifacts import read_tensors
from arisk.base.errors import ConfigError, DamagedError
from arisk.config.plan import Config
from arisk.engine.run import run_stages
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


def test_a_stage_begins_anew_where_its_leftovers_cannot_be_read(tmp_path):
    calls = []

    def run(job, workspace):
        calls.append(sorted(file.name for file in workspace.iterdir()))
        half = workspace / "shard.safetensors"
        if len(calls) == 1:
            half.write_bytes(b"half")
            (workspace / "other.json").touch()
            raise KeyboardInterrupt
        if half.exists():
            read_tensors(half)

    with pytest.raises(KeyboardInterrupt):
        went(tmp_path, run)
    told = went(tmp_path, run)
    assert calls == [[], ["other.json", "shard.safetensors"], []]
    assert "work      begins anew: shard.safetensors of a stopped run cannot be read" in told
    assert (tmp_path / "work" / "manifest.json").exists()


def test_a_stage_that_damages_its_own_files_ends_with_the_way_out(tmp_path):
    def run(job, workspace):
        (workspace / "shard.safetensors").write_bytes(b"half")
        read_tensors(workspace / "shard.safetensors")

    with pytest.raises(DamagedError) as caught:
        went(tmp_path, run)
    assert f"remove {tmp_path}/.partial/work-" in caught.value.fix
    assert "run the same command again" in caught.value.fix


def test_data_that_the_run_itself_writes_is_refused(tmp_path):
    own = tmp_path / "run" / "work" / KEPT_FILE
    with pytest.raises(ConfigError, match="written by the run that would read it") as caught:
        went(tmp_path / "run", lambda *_: None, finetune={"path": str(own)})
    assert caught.value.where.startswith("finetune.path: ")
    assert "--run-dir" in caught.value.fix
