"""Paths that nobody means: each is an error at once, and nothing is read or written through it."""

import os
import shlex

import pytest

from arisk.base.errors import InputError
from arisk.config.plan import Config
from arisk.engine import fingerprints
from arisk.engine.fingerprints import DigestCache, input_fingerprints


@pytest.mark.parametrize("option", ["--model", "--safety", "--safety-prompts", "--finetune"])
@pytest.mark.parametrize("text", ["", " ", "a\nb", "a\x1b[2J", os.fsdecode(b"a\xff"), "x" * 300])
def test_init_names_no_file_that_a_config_may_not_name(arisk, tmp_path, option, text):
    code, _, err = arisk("init", tmp_path / "new.yaml", option, text)
    assert code == 2
    assert f"where: {option}" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_init_writes_files_alone(arisk, tmp_path, make):
    """A pipe would be waited for, and a device take what nobody reads."""
    make(tmp_path / "new.yaml")
    code, _, err = arisk("init", tmp_path / "new.yaml", "--force")
    assert code == 2
    assert "something else than a file" in err


def test_what_init_tells_to_type_next_is_one_word(arisk, tmp_path):
    path = tmp_path / "a plan; ls.yaml"
    code, out, _ = arisk("init", path)
    assert code == 0
    words = shlex.split(out.partition("next: ")[2])
    assert words == ["arisk", "check", str(path), "&&", "arisk", "run", str(path)]


def fingerprinted(tmp_path, **sections):
    (tmp_path / "model").mkdir(exist_ok=True)
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n")
    values = {"model": {"path": str(tmp_path / "model")}, "safety": str(data), "finetune": str(data)}
    return input_fingerprints(Config.model_validate({**values, **sections}), DigestCache(tmp_path / "cache"))


def test_a_folder_without_data_is_not_read_for_them(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "large").write_bytes(b"x")
    with pytest.raises(InputError, match="no data files") as caught:
        fingerprinted(tmp_path, finetune=str(home))
    assert str(home) in caught.value.where


@pytest.mark.parametrize("section", ["finetune", "model"])
def test_a_folder_of_a_whole_machine_is_not_read(tmp_path, section, monkeypatch):
    monkeypatch.setattr(fingerprints, "MOST_FILES", 3)
    home = tmp_path / "home"
    (home / "deep").mkdir(parents=True)
    (home / ".cache").mkdir()
    for i in range(4):
        (home / ".cache" / f"{i}.json").write_text("{}")
    for i in range(3):
        (home / "deep" / f"{i}.json").write_text("{}")
    given = {section: {"path": str(home)}}
    assert set(fingerprinted(tmp_path, **given)[section]) == {f"deep/{i}.json" for i in range(3)}
    (home / "one-more.json").write_text("{}")
    with pytest.raises(InputError, match="more than 3 files"):
        fingerprinted(tmp_path, **given)
