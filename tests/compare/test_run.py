"""`arisk compare` on the embedded model: order, sharing, refusals, and nothing lost when it is killed."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from arisk.engine.freshness import stage_key
from arisk.engine.rundir import RunDir

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "why": "full",
    "safety.max_samples": 16,
    "control.max_samples": 16,
    "score.batches": 2,
    "score.hvp_batches": 1,
    "score.krylov_dim": 2,
    "score.nulls": 3,
    "score.examples": 4,
    "score.probe_points": 2,
    "training.max_steps": 60,
    "training.batch_size": 4,
    "forecast.bootstrap_samples": 40,
    "run.threads": 1,
}
SET = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
NAMES = ("benign", "mixed", "risky")
STAGES = ("rollout", "forecast", "collect", "subspace", "score", "report")


@pytest.fixture
def no_model(monkeypatch):
    monkeypatch.setattr("arisk.models.load_task", lambda *a, **k: pytest.fail("the model was loaded"))


def write_configs(folder):
    """One config per fine-tuning set, all else equal."""
    folder.mkdir(parents=True, exist_ok=True)
    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    text = json.dumps(demo).replace("../fixtures", str(ROOT / "fixtures"))
    for name in NAMES:
        (folder / f"{name}.yaml").write_text(text.replace("mixed.jsonl", f"{name}.jsonl"))
    return [folder / f"{name}.yaml" for name in NAMES]


def command(world, *extra):
    return ["compare", *world.configs, "--run-dir", world.runs, "--output", world.output, *SET, *extra]


class World:
    """Configs, their run directories and the comparison of one folder."""

    def __init__(self, folder):
        self.configs = write_configs(folder / "plans")
        self.runs, self.output = folder / "runs", folder / "out"

    @property
    def folders(self):
        return [self.runs / name for name in NAMES]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished comparison of three configs, and what the command said."""
    world = World(tmp_path_factory.mktemp("compare"))
    done = subprocess.run(
        [sys.executable, "-m", "arisk", *map(str, command(world))],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    world.out, world.err = done.stdout, done.stderr
    return world


@pytest.fixture
def copied(made, tmp_path):
    """The finished runs, free to be harmed."""
    world = World(tmp_path)
    shutil.copytree(made.runs, world.runs)
    return world


def compared(world):
    return json.loads((world.output / "compare.json").read_text())


def snapshot(*folders):
    return {
        str(file): file.read_bytes()
        for folder in folders
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (".lock", ".digests.json")
    }


def test_benign_before_mixed_before_risky(made):
    found = compared(made)
    assert [(run["rank"], run["name"]) for run in found["runs"]] == list(enumerate(NAMES, 1))
    assert found["runs"][0]["level"] == "low"
    assert found["runs"][2]["level"] == "high"
    assert made.out.splitlines()[-1] == f"report: {made.output / 'compare.html'}"
    assert found["settings"].keys() == {"finetune.path"}


def test_the_documented_keys_are_there(made):
    told = (ROOT / ".github" / "SUMMARY.md").read_text()
    start = told.index("`compare.json` holds")
    head, each = told[start : told.index("\n\n", start)].split("each with")
    found = compared(made)
    for name in re.findall(r"`(\w+)`", head):
        assert name in found
    names = re.findall(r"`(\w+)`", each)
    assert len(names) > 15
    for run in found["runs"]:
        assert all(name in run for name in names)
        assert set(run["final"]) == {"median", "lower", "upper"}


def test_one_plan_under_two_names_is_said(made, arisk, no_model, tmp_path):
    shutil.copytree(made.runs / "mixed", tmp_path / "again")
    args = [made.runs / "mixed", tmp_path / "again", "--output", tmp_path / "out"]
    code, out, _ = arisk("compare", *args)
    assert code == 0
    assert "mixed and again are the same plan" in out
    assert [line.split()[:2] for line in out.splitlines()[4:6]] == [["1", "again"], ["1", "mixed"]]


def test_the_safety_side_is_measured_once_and_shared(made):
    for first, second in itertools.pairwise(made.folders):
        for stage in ("collect", "subspace"):
            assert RunDir(second).manifest(stage)["outputs"] == RunDir(first).manifest(stage)["outputs"]
    assert made.err.count("collect   done") == 1
    assert made.err.count("collect   taken from") == made.err.count("subspace  taken from") == 2
    assert made.err.count("rollout   done") == 3
    shared = [run["shared_seconds"] > 0 for run in compared(made)["runs"]]
    assert shared == [False, True, True]


def test_each_report_tells_of_its_own_data(made):
    """The shared stage must not carry the data of the plan that measured it."""
    record = json.loads((made.runs / "mixed" / "collect" / "record.json").read_text())
    assert set(record["values"]["task"]["data"]) == {"safety"}
    record = json.loads((made.runs / "mixed" / "rollout" / "record.json").read_text())
    assert record["values"]["task"]["data"]["finetune"]["rows"] == 400
    page = (made.runs / "mixed" / "report" / "report.html").read_text()
    assert "finetune: rows 400" in page
    assert f" s, taken from {made.runs / 'benign'}" in page


def test_a_second_time_nothing_runs_and_no_byte_changes(made, arisk, no_model):
    before = snapshot(made.runs, made.output)
    code, out, err = arisk(*command(made))
    assert code == 0
    assert " done in " not in err
    assert "taken from" not in err
    assert out == made.out
    assert snapshot(made.runs, made.output) == before


def test_runs_are_read_from_their_artifacts_in_any_order(made, arisk, no_model, tmp_path):
    before = snapshot(made.runs)
    for turn, folders in enumerate(itertools.permutations(made.folders)):
        output = tmp_path / str(turn)
        code, out, _ = arisk("compare", *folders, "--output", output, "--json")
        assert code == 0
        found = json.loads(out, parse_constant=pytest.fail)
        assert [run["name"] for run in found["runs"]] == list(NAMES)
        assert found["work"] == {}
    assert snapshot(made.runs) == before


def test_a_config_beside_a_run_takes_the_safety_side_without_a_model(made, arisk, no_model, tmp_path):
    args = ["--run-dir", tmp_path / "r", *SET]
    sources = [part for folder in made.folders for part in ("--reuse", folder)]
    code, _, err = arisk("run", made.configs[1], *args, "--until", "subspace", *sources)
    assert code == 0, err
    assert "collect   taken from" in err
    code, _, err = arisk("run", made.configs[1], *args, "--force", *sources)
    assert (code, "leave one of them out" in err) == (2, True)
    code, _, err = arisk("run", made.configs[1], *args, "--reuse", tmp_path / "nowhere")
    assert (code, "no such run directory" in err) == (4, True)


def test_the_model_is_loaded_once_and_forced_stages_are_made_once(copied, arisk, monkeypatch):
    from arisk.models import tasks

    loads = []
    real = tasks.load_model
    monkeypatch.setattr(tasks, "load_model", lambda *a, **k: loads.append(a) or real(*a, **k))
    copied.configs, folders = copied.configs[:2], copied.folders[:2]
    before = snapshot(*(folder / "rollout" for folder in folders))
    code, out, err = arisk(*command(copied, "--force", "--json"))
    assert code == 0
    assert len(loads) == 1
    assert err.count("collect   done") == 1
    work = json.loads(out)["work"]
    assert [sorted(made["taken"]) for made in work.values()] == [[], ["collect", "subspace"]]
    # A model that an earlier plan was rolled out on gives the later ones the same bytes.
    after = snapshot(*(folder / "rollout" for folder in folders))
    assert all(after[name] == body for name, body in before.items() if name.endswith(".safetensors"))


def test_a_damaged_safety_side_is_not_taken_but_measured(copied, arisk):
    for name in ("benign", "mixed"):
        shard = next((copied.runs / name / "collect" / "gradients").glob("shard-*"))
        shard.unlink()
    for stage in STAGES:
        shutil.rmtree(copied.runs / "risky" / stage)
    args = ["--run-dir", copied.runs / "risky", "--until", "subspace", *SET]
    code, _, err = arisk("run", copied.configs[2], *args, "--reuse", copied.runs / "benign")
    assert code == 0
    assert "collect   done" in err
    # Keys are made of contents: the eigenvectors belong to these gradients whoever measured them.
    assert "subspace  taken from" in err


def config_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def write_config(folder, change):
    body = config_of(folder)
    change(body)
    (folder / "config.yaml").write_text(yaml.safe_dump(body))


def stale(folder):
    write_config(folder, lambda body: body["training"].update(learning_rate=0.5))


def unfinished(folder):
    shutil.rmtree(folder / "forecast")


def torn(folder):
    path = folder / "forecast" / "record.json"
    path.write_text(path.read_text()[:-20])


def from_the_future(folder):
    path = folder / "score" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99}))


def of_another_version(folder):
    path = folder / "rollout" / "manifest.json"
    body = json.loads(path.read_text())
    body["ingredients"]["stage_version"] = 0
    path.write_text(json.dumps({**body, "key": stage_key(body["ingredients"])}))


def foreign_config(folder):
    write_config(folder, lambda body: body["training"].update(wormhole=1))


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (stale, "learning_rate"),
        (unfinished, "forecast of this run is not up to date: not run yet"),
        (torn, "not what the stage wrote"),
        (from_the_future, "upgrade arisk"),
        (of_another_version, "differently now"),
        (foreign_config, "not one of this arisk"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(copied, arisk, harm, what):
    harm(copied.runs / "mixed")
    code, out, err = arisk("compare", *copied.folders, "--output", copied.output)
    assert code == 4
    assert what in err
    assert "mixed" in err
    assert "\nfix:   " in err
    assert out == ""
    assert not (copied.output / "compare.html").exists()


def test_wrong_arguments_are_told_all_at_once(made, arisk, tmp_path):
    one = made.runs / "mixed"
    output = ["--output", tmp_path / "out"]
    for args, code, what in [
        ([one], 2, "two plans or more"),
        ([one, one], 2, "given twice"),
        ([one, made.runs / "." / "mixed"], 2, "given twice"),
        ([made.configs[1], one, "--run-dir", made.runs], 2, "are one run"),
        ([one, tmp_path / "nowhere"], 4, "no such run directory or config"),
        ([one, one / "score"], 4, "the stage score of a run"),
        ([one, made.output], 4, "not a run directory"),
    ]:
        found, _, err = arisk("compare", *args, *output)
        assert (found, what in err) == (code, True), err
    _, _, err = arisk("compare", tmp_path / "a", tmp_path / "b", *output)
    assert err.count("error: ") == 2
    code, _, err = arisk("compare", *made.folders, "--output", one)
    assert (code, "holds a run" in err) == (2, True)


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("model.dtype=float64", "model.dtype (float32 against float64)"),
        ("safety.max_samples=8", "safety.max_samples (16 against 8)"),
        (f"safety.path={ROOT / 'fixtures' / 'data' / 'safety_heldout.jsonl'}", "the safety rows differ"),
        ("run.seed=3", "seed (0 against 3)"),
    ],
)
def test_plans_for_another_model_or_safety_set_are_refused_before_any_work(
    made, arisk, no_model, tmp_path, setting, what
):
    args = ["--run-dir", tmp_path / "runs", "--output", tmp_path / "out", *SET, "--set", setting]
    code, _, err = arisk("compare", made.runs / "benign", made.configs[2], *args)
    assert code == 4
    assert what in err
    assert not (tmp_path / "runs").exists()


def test_other_thresholds_are_compared_and_said(copied, arisk, no_model):
    args = ["--run-dir", copied.runs / "mixed", *SET, "--set", "forecast.collapse_threshold=0.3"]
    assert arisk("run", copied.configs[1], *args)[0] == 0
    code, out, _ = arisk("compare", *copied.folders, "--output", copied.output)
    assert code == 0
    assert "The collapse threshold is not the same in all runs" in out
    assert "mixed 0.3 nats/token" in out
    assert compared(copied)["settings"]["forecast.collapse_threshold"]["mixed"] == "0.3"


def test_input_files_may_be_gone_and_changed_ones_are_said(copied, arisk, no_model, tmp_path):
    rows = tmp_path / "mine.jsonl"
    rows.write_text("changed")
    write_config(copied.runs / "risky", lambda body: body["finetune"].update(path=str(rows)))
    code, out, _ = arisk("compare", *copied.folders, "--output", copied.output)
    assert code == 0
    assert "risky: The finetune files changed since this run." in out
    rows.unlink()
    code, out, _ = arisk("compare", *copied.folders, "--output", copied.output)
    assert code == 0
    assert "changed since" not in out


def test_gates_look_at_the_worst_and_leave_stdout_to_the_result(made, arisk, no_model):
    for args, code in [((), 10), (("--fail-on", "high"), 10), (("--fail-on", "elevated"), 10)]:
        found, out, err = arisk(*command(made, "--json", "-q", *args))
        assert found == (code if args else 0)
        assert json.loads(out, parse_constant=pytest.fail)["runs"][0]["name"] == "benign"
        assert ("the verdict is high" in err) == bool(args)


def test_two_comparisons_at_once(made, arisk):
    with RunDir(made.output).lock("arisk compare first"):
        code, _, err = arisk(*command(made))
    assert (code, "arisk compare first" in err) == (4, True)
    with RunDir(made.runs / "mixed").lock("arisk run first"):
        code, _, err = arisk(*command(made))
    assert (code, "arisk run first" in err) == (4, True)


KILL = """
import os, signal, sys
folder, stage = sys.argv[1:3]
sys.argv = ["arisk", *sys.argv[3:]]
from arisk import cli
from arisk.engine import rundir
def kill(method):
    real = getattr(rundir.RunDir, method)
    def stop(self, name, *rest, **more):
        if self.path.name == folder and name == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, name, *rest, **more)
    setattr(rundir.RunDir, method, stop)
kill("commit")
kill("write")
cli.main()
"""


def test_killed_anywhere_it_goes_on_where_it_was(tmp_path, made, arisk):
    """Killed while a stage is taken over, in a later plan, and between two files of the result."""
    world = World(tmp_path)
    for name in ("benign", "risky"):
        shutil.copytree(made.runs / name, world.runs / name)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for folder, stage in [("mixed", "collect"), ("mixed", "forecast"), ("out", "compare.json")]:
        args = [sys.executable, "-c", KILL, folder, stage, *map(str, command(world))]
        killed = subprocess.run(args, check=False, capture_output=True, text=True, env=env)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert killed.stderr.count("rollout   done") == 0
    assert killed.stderr.count("forecast  done") == 1
    code, out, err = arisk(*command(world))
    assert code == 0
    assert " done in " not in err
    assert out.splitlines()[:6] == made.out.splitlines()[:6]
    for folder, other in zip(world.folders, made.folders, strict=True):
        for stage in STAGES[:-1]:
            for file in (other / stage).rglob("*"):
                if file.suffix == ".safetensors":
                    same = folder / stage / file.relative_to(other / stage)
                    assert same.read_bytes() == file.read_bytes(), file
    assert not list(world.runs.glob("*/.partial"))
