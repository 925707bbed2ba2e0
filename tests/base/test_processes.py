"""Several processes at one run: the numbers of one process, and a killed one loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arisk.base import processes
from arisk.base.errors import ArtifactError
from tests.base.sharded import MODELS, measured

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "model.dtype=float64",
    "safety.max_samples=13",
    "collect.chunk_size=3",
    "score.batches=3",
    "score.hvp_batches=3",
    "score.krylov_dim=2",
    "score.nulls=5",
    "score.examples=9",
    "score.probe_points=1",
    "training.max_steps=40",
    "training.batch_size=3",
    "training.gradient_accumulation=2",
    "training.max_grad_norm=1.0",
    "training.weight_decay=0.01",
    "rollout.control_samples=8",
    "forecast.bootstrap_samples=20",
    "run.threads=1",
    "run.device=cpu",
]


def carried_out(folder, count, *extra, errors=None, verb="run", configs=None, program=("-m", "arisk")):
    """A command on the demo's config by so many processes, when it has ended."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, *(several if count > 1 else []), *program, verb]
    command += [*(configs or [str(ROOT / "configs" / "demo.yaml")]), "--run-dir", str(folder)]
    command += [*(part for item in SETTINGS for part in ("--set", item)), *extra]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    shown = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
    with subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True, **shown) as running:
        try:
            out, err = running.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # The workers too, not the launcher alone.
            raise
    return subprocess.CompletedProcess(command, running.returncode, out, err)


def finish(*given, **options):
    """What such a command printed; it must end well."""
    done = carried_out(*given, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def differences(one, two):
    """Tensors of two run directories that differ by more than 1e-9 of their size."""
    found = []
    files = sorted(one.rglob("*.safetensors"))
    assert files
    for file in files:
        ours, theirs = load_file(file), load_file(two / file.relative_to(one))
        for name, value in ours.items():
            scale = float(value.nan_to_num().abs().max()) if value.numel() else 0.0
            if not torch.allclose(value, theirs[name], rtol=0, atol=1e-9 * scale, equal_nan=True):
                found.append(f"{file.relative_to(one)}: {name}")
    return found


ACTING = {
    "screen": [
        *("screen.max_steps=6", "screen.rise=1e-9", "screen.batches=3", "screen.control_samples=20"),
        *("screen.examples=5", "screen.drop=0.05", "screen.points=both", "screen.batch_size=5"),
        *("rollout.pilot_steps=6", "training.max_steps=12", "finetune.max_samples=140"),
    ],
    "guard": [
        *("guard.methods=[replay,ewc,alignguard,projection]", "guard.replay.strengths=[0.3]"),
        *(
            "guard.ewc.strengths=[10]",
            "guard.alignguard.strengths=[3]",
            "guard.calibration_steps=2",
            "guard.task_samples=16",
        ),
        *("guard.control_samples=16", "guard.steps=4", "guard.generate=2", "guard.max_new_tokens=6"),
    ],
}


def numbers(value, place="", skipped=("seconds",)):
    """Every number and text of a JSON value by its place; places with these words are left out."""
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [numbers(one, f"{place}.{name}", skipped) for name, one in inside]
        return {key: found for part in parts for key, found in part.items()}
    return {} if any(word in place for word in skipped) else {place: value}


def assert_same(one, two, *, at_least):
    """The same texts at the same places, and numbers equal to rounding."""
    assert one.keys() == two.keys()
    for place, value in one.items():
        close = pytest.approx(value, rel=1e-8, abs=1e-11) if isinstance(value, float) else value
        assert two[place] == close, place
    assert sum(isinstance(value, float) for value in one.values()) > at_least


@pytest.mark.parametrize("verb", ACTING)
def test_two_processes_screen_and_protect_as_one_does(tmp_path, verb):
    settings = [part for item in ACTING[verb] for part in ("--set", item)]
    finish(tmp_path / "one", 1, *settings, verb=verb)
    finish(tmp_path / "two", 2, *settings, verb=verb)
    one, two = (
        numbers(json.loads((tmp_path / name / verb / "record.json").read_text(encoding="utf-8"))["values"])
        for name in ("one", "two")
    )
    assert_same(one, two, at_least=30)
    if verb == "screen":
        ours, theirs = (load_file(tmp_path / n / verb / "scores.safetensors") for n in ("one", "two"))
        for name, value in ours.items():
            scale = float(value.double().abs().max())
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-9 * scale)


def test_two_processes_compare_as_one_does(tmp_path):
    """Both plans are worked through by both processes; one of them speaks and writes the page."""
    demo = (ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8").replace("../", f"{ROOT}/")
    (tmp_path / "mixed.yaml").write_text(demo, encoding="utf-8")
    plain = demo.replace("data/mixed.jsonl", "data/benign.jsonl")
    (tmp_path / "benign.yaml").write_text(plain, encoding="utf-8")
    bodies = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        plans = [str(tmp_path / "mixed.yaml"), str(tmp_path / "benign.yaml")]
        given = ["--output", str(folder / "page"), "--set", "rollout.pilot_steps=6", "--json"]
        out = finish(folder, count, *given, verb="compare", configs=plans)
        timeless = re.sub(r"\d+ s spared", "spared", out.replace(str(folder), ""))
        bodies.append(numbers(json.loads(timeless), skipped=("seconds", "cost")))
        assert (folder / "page" / "compare.html").exists()
    assert bodies[0].keys() == bodies[1].keys()
    assert_same(*bodies, at_least=20)


@pytest.mark.parametrize(
    "extra",
    [
        ("--until", "rollout"),
        ("--until", "score", *("--set", "collect.store=gram", "--set", "score.nulls=0")),
    ],
    ids=["gradients", "gram"],
)
def test_two_processes_give_the_numbers_of_one(tmp_path, extra):
    finish(tmp_path / "one", 1, *extra)
    out = finish(tmp_path / "two", 2, *extra)
    assert out.count("run directory") == 1  # one of them speaks
    assert differences(tmp_path / "one", tmp_path / "two") == []


def test_a_sharded_model_gives_the_numbers_of_a_whole_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.base.sharded", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "sharded over processes" in done.stdout  # from the stage that moves parameters
    sharded = load_file(tmp_path / "numbers.safetensors")
    for name in MODELS:
        whole = measured(name, tmp_path / "whole")[1]
        for key, value in whole.items():
            torch.testing.assert_close(sharded[key], value, rtol=1e-9, atol=1e-13)


#: The command line, whose second process kills itself once it has written two shards.
KILLED = """
import os, signal
from arisk import cli
from arisk.gradients import GradientStore

written = []
write = GradientStore.write_shard

def write_shard(self, index, blocks):
    write(self, index, blocks)
    written.append(index)
    if os.environ["RANK"] == "1" and len(written) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

GradientStore.write_shard = write_shard
cli.main()
"""


def test_a_killed_process_ends_the_run_and_loses_nothing(tmp_path):
    folder = tmp_path / "run"
    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    given = ("--until", "collect", "--set", "collect.chunk_size=1")
    killed = carried_out(folder, 2, *given, errors=subprocess.PIPE, program=[str(tmp_path / "killed.py")])
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr  # torchrun names the process that died
    kept = {p: p.stat().st_mtime_ns for p in (folder / ".partial").rglob("shard-*.safetensors")}
    assert 2 <= len(kept) < 13
    finish(folder, 2, *given)
    made = folder / "collect" / "gradients"
    assert len(list(made.iterdir())) == 13
    assert {(made / p.name).stat().st_mtime_ns for p in kept} == set(kept.values())


def test_a_broken_collective_says_what_it_means():
    with (
        pytest.raises(ArtifactError, match="another process of this run has stopped") as caught,
        processes._together(),
    ):
        raise RuntimeError("Connection reset by peer")
    assert "run the same command again" in caught.value.fix


def test_one_process_has_everything():
    assert (processes.rank(), processes.world(), processes.is_first()) == (0, 1, True)
    assert list(processes.share(5)) == [0, 1, 2, 3, 4]
    assert processes.gathered(["a", "b"], 2) == ["a", "b"]
    value = torch.ones(2)
    assert processes.summed(value) is value
    assert processes.from_first(lambda: 3) == 3
    processes.barrier()


@pytest.mark.parametrize(
    ("number", "count", "first"),
    [
        ("1", "2", False),
        ("0", "2", True),
        # Left behind where nobody started several processes: this one works alone.
        ("3", None, True),
        ("9" * 31, None, True),
        ("\udced x", "2", True),
        ("1", "1", True),
        ("5", "2", True),
        ("²", "9" * 5000, True),
        ("-1", "2", True),
    ],
)
def test_what_nobody_started_is_no_other_process(monkeypatch, number, count, first):
    monkeypatch.setenv("RANK", number)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if count is not None:
        monkeypatch.setenv("WORLD_SIZE", count)
    assert processes.is_first() is first
