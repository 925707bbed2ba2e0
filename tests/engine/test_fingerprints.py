import hashlib

import pytest

from arisk.base.errors import InputError
from arisk.config.plan import Config
from arisk.engine.fingerprints import DigestCache, file_digest, input_fingerprints


def config(tmp_path, **changes):
    (tmp_path / "m").mkdir(exist_ok=True)
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "d.jsonl").write_text("x")
    values = {
        "model": {"path": str(tmp_path / "m")},
        "safety": {"path": str(tmp_path / "d.jsonl")},
        "finetune": {"path": "owner/name"},
    }
    return Config.model_validate({**values, **changes})


def test_digests_are_of_contents(tmp_path):
    found = input_fingerprints(config(tmp_path), DigestCache(tmp_path / "cache.json"))
    assert found["model"] == {"config.json": hashlib.sha256(b"{}").hexdigest()}
    assert found["safety"] == {"sha256": hashlib.sha256(b"x").hexdigest()}
    assert found["finetune"] == {"hub": "owner/name", "revision": None}
    assert "control" not in found


def test_an_unchanged_file_is_not_read_again(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("one")
    cache = DigestCache(tmp_path / "cache.json")
    first = cache.digest(path)
    cache.save()
    monkeypatch.setattr("arisk.engine.fingerprints.file_digest", lambda _: pytest.fail("read again"))
    assert DigestCache(tmp_path / "cache.json").digest(path) == first


def test_a_changed_file_is_read_again_and_a_damaged_cache_is_no_truth(tmp_path):
    path = tmp_path / "file"
    path.write_text("one")
    cache = DigestCache(tmp_path / "cache.json")
    first = cache.digest(path)
    path.write_text("two!")
    assert cache.digest(path) != first
    (tmp_path / "cache.json").write_text("{broken")
    assert DigestCache(tmp_path / "cache.json").digest(path) == file_digest(path)


@pytest.mark.parametrize(
    "missing", ["./no.jsonl", "no/such/file.jsonl", "rows.jsonl", "~/no-such-folder-here"]
)
def test_a_missing_path_is_not_taken_for_a_hub_id(tmp_path, missing):
    with pytest.raises(InputError, match="does not exist") as caught:
        input_fingerprints(config(tmp_path, safety={"path": missing}), DigestCache(tmp_path / "c"))
    assert caught.value.where == "safety.path"


def test_python_entries_are_known_by_their_source(tmp_path, monkeypatch):
    (tmp_path / "code.py").write_text("a = 1")
    monkeypatch.chdir(tmp_path)
    made = Config.model_validate({"model": {"source": "python", "entry": "code.py:make"}})
    found = input_fingerprints(made, DigestCache(tmp_path / "c"))
    assert found["model"]["sha256"] == hashlib.sha256(b"a = 1").hexdigest()


def test_the_judge_decides_which_own_answers_are_responses(tmp_path):
    def safety(rows, **changes):
        values = config(tmp_path, **changes)
        (tmp_path / "d.jsonl").write_text(rows)
        return input_fingerprints(values, DigestCache(tmp_path / "c"))["safety"]

    judged = {"behaviour": {"refusal_openings": ["nein"]}}
    alone, answered = '{"prompt": "a"}', '{"prompt": "a", "response": "b"}'
    assert safety(alone) != safety(alone, **judged)
    assert safety(answered) == safety(answered, **judged)
    named = {"safety": {"path": "owner/prompts", "format": "prompts"}}
    assert safety("", **named) != safety("", **named, **judged)
