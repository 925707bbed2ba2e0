"""`arisk screen` on the embedded model: files, flags, kill and resume, mistakes, report."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arisk.base.errors import InputError
from arisk.config.plan import DataConfig
from arisk.screening.stage import split_rows

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")
ROWS = 60
ODD = {"note": "日本語 \u2028 <b>&", "nested": {"a": [1, None, 2.5]}, "id": 7}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The first 60 rows of the embedded mixture, one of them with odd fields, blank lines between."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [json.loads(line) for line in (ROOT / "fixtures/data/mixed.jsonl").read_text().splitlines()[:ROWS]]
    rows[3] |= ODD
    lines = [json.dumps(row, ensure_ascii=number % 2 == 0) for number, row in enumerate(rows)]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path, rows


def settings(path):
    given = [
        f"finetune.path={path}",
        "safety.max_samples=8",
        "control.max_samples=20",
        "training.max_steps=40",
        "training.batch_size=4",
        "screen.max_steps=10",
        "screen.batches=2",
        "screen.examples=4",
        "screen.what_if=false",
        "run.threads=1",
    ]
    return [part for item in given for part in ("--set", item)]


@pytest.fixture
def arisk(arisk, data):
    """The command on these settings."""

    def call(verb, folder, *extra):
        return arisk(verb, DEMO, "--run-dir", folder, *settings(data[0]), *extra)

    return call


@pytest.fixture(scope="module")
def screened(data, tmp_path_factory):
    """A finished screening of a share."""
    folder = tmp_path_factory.mktemp("screen") / "run"
    command = [sys.executable, "-m", "arisk", "screen", DEMO, "--run-dir", str(folder), "--drop", "10%"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *settings(data[0])], check=True, capture_output=True, text=True, env=environment
    )
    return folder, done.stdout


def lines(folder, name):
    return [
        json.loads(line)
        for line in (folder / "screen" / name).read_text(encoding="utf-8").split("\n")
        if line
    ]


def test_every_row_is_kept_or_flagged_once_with_all_its_fields(screened, data):
    folder, out = screened
    kept, flagged = lines(folder, "kept.jsonl"), lines(folder, "flagged.jsonl")
    assert len(flagged) == ROWS // 10
    added = {"arisk_score", "arisk_at_mean_length", "arisk_rank", "arisk_reasons"}
    found = [{k: v for k, v in row.items() if k not in added} for row in (*kept, *flagged)]
    key = lambda row: json.dumps(row, sort_keys=True)  # noqa: E731
    assert sorted(found, key=key) == sorted(data[1], key=key)
    assert sorted(row["arisk_rank"] for row in (*kept, *flagged)) == list(range(1, ROWS + 1))
    assert {row["arisk_rank"] for row in flagged} == set(range(1, ROWS // 10 + 1))
    assert all(row["arisk_reasons"] for row in flagged)
    assert not any(row["arisk_reasons"] for row in kept)
    assert "日本語" in "".join(f.read_text(encoding="utf-8") for f in folder.glob("screen/*.jsonl"))
    assert f"{ROWS // 10} of {ROWS} rows are flagged" in out.splitlines()[0]
    tensors = load_file(folder / "screen" / "scores.safetensors")
    rank = torch.argsort(tensors["scores"], descending=True).argsort() + 1
    by_prompt = {row["prompt"]: row["arisk_rank"] for row in (*kept, *flagged)}
    assert [by_prompt[row["prompt"]] for row in data[1]] == rank.tolist()


def test_another_share_scores_nothing_again(arisk, screened, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(screened[0], tmp_path / "run"))
    monkeypatch.setattr("arisk.screening.run.screen", lambda *a, **k: pytest.fail("rows were scored again"))
    code, out, _ = arisk("screen", folder, "--drop", "0.05", "--json")
    assert code == 0
    body = json.loads(out, parse_constant=pytest.fail)
    assert len(body["screen"]["flagged"]) == 3
    assert len(lines(folder, "flagged.jsonl")) == 3
    assert body["missing"] == "rollout"
    code, out, err = arisk("screen", folder, "--drop", "5%")
    assert code == 0
    assert "up to date" in err


def test_the_report_shows_it(arisk, screened, tmp_path):
    folder = Path(shutil.copytree(screened[0], tmp_path / "run"))
    small = [
        *("collect.chunk_size=4", "score.batches=2", "score.hvp_batches=1", "score.krylov_dim=2"),
        *("score.nulls=3", "score.examples=4", "score.probe_points=2", "forecast.bootstrap_samples=20"),
        *("rollout.enabled=false", "screen.drop=0.1"),
    ]
    given = [part for item in small for part in ("--set", item)]
    code, _, err = arisk("run", folder, *given)
    assert code == 0, err
    code, out, err = arisk("screen", folder, *given)
    assert code == 0, err
    assert out.splitlines()[-1].endswith("report.html")
    page = (folder / "report" / "report.html").read_text()
    assert 'id="screen"' in page
    assert "fig-screen-scores" in page
    body = json.loads((folder / "report" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert len(body["screen"]["flagged"]) == ROWS // 10
    assert "Screened rows:" in (folder / "report" / "summary.md").read_text()


KILL = """
import os, signal, sys
sys.argv = ["arisk", *sys.argv[1:]]
from arisk.screening import estimates as screen_passes
screen_passes.SHARD_ROWS = 16
products, done = screen_passes.row_products, [0]
def dying(*given, **settings):
    done[0] += 1
    if done[0] == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return products(*given, **settings)
screen_passes.row_products = dying
from arisk import cli
cli.main()
"""


def test_killed_in_the_middle_it_goes_on_and_ends_the_same(screened, data, tmp_path):
    common = ["screen", DEMO, "--run-dir", str(tmp_path / "run"), "--drop", "10%", *settings(data[0])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILL, *common], check=False, capture_output=True, env=environment
    )
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob("run/.partial/screen-*/rows-finetune-*.safetensors"))) == 2
    # The rest with the same shards.
    rest = KILL.replace("== 9", "== -1")
    subprocess.run([sys.executable, "-c", rest, *common], check=True, capture_output=True, env=environment)
    for name in ("scores.safetensors", "kept.jsonl", "flagged.jsonl", "record.json"):
        assert (tmp_path / "run/screen" / name).read_bytes() == (screened[0] / "screen" / name).read_bytes()
    assert not list(tmp_path.glob("run/screen/*rows-*"))


@pytest.mark.parametrize("share", ["0", "100%", "1", "-3%", "many", "nan"])
def test_a_share_outside_the_rows_is_one_clear_error(arisk, tmp_path, share):
    code, _, err = arisk("screen", tmp_path / "run", f"--drop={share}")
    assert code == 2
    assert "is no share of the rows" in err
    assert "--drop" in err


def test_a_wrong_setting_is_one_clear_error(arisk, tmp_path):
    for setting, what in (("screen.drop=1.5", "screen.drop"), ("screen.rises=3", "rise")):
        code, _, err = arisk("screen", tmp_path / "run", "--set", setting)
        assert code == 2
        assert what in err


def test_a_file_that_lost_rows_is_one_clear_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n')
    config = DataConfig(path=str(path))
    with pytest.raises(InputError, match="no longer in the data"):
        split_rows(config, [(str(path), 1), (str(path), 2)], [{}, {}], frozenset(), tmp_path / "out")


def test_text_that_is_no_unicode_survives(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "\\ud800", "response": "b", "x": NaN}\n{"prompt": "é", "response": "c"}\n')
    added = [{"arisk_rank": 2}, {"arisk_rank": 1}]
    config, places = DataConfig(path=str(path)), [(str(path), 1), (str(path), 2)]
    assert split_rows(config, places, added, frozenset([1]), tmp_path / "out") == (1, 1)
    kept = json.loads((tmp_path / "out" / "kept.jsonl").read_text(encoding="utf-8"))
    assert kept["prompt"] == "\ud800"
    assert kept["arisk_rank"] == 2
    assert "é" in (tmp_path / "out" / "flagged.jsonl").read_text(encoding="utf-8")
