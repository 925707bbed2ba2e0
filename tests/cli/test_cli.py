"""The command line on the embedded model: one clear error, its exit code, and nothing lost."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arisk.cli import main
from arisk.engine.freshness import stage_key

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
SMALL = [
    "safety.max_samples=8",
    "collect.chunk_size=4",
    "why=full",
    "score.batches=2",
    "score.hvp_batches=1",
    "score.krylov_dim=2",
    "score.nulls=3",
    "score.examples=4",
    "score.probe_points=2",
    "training.max_steps=60",
    "training.batch_size=2",
    "forecast.bootstrap_samples=20",
    "run.threads=1",
]
DEMO = str(ROOT / "configs" / "demo.yaml")


def arguments(*extra):
    return [part for item in (*SMALL, *extra) for part in ("--set", item)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished small run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    subprocess.run(
        [sys.executable, "-m", "arisk", "run", DEMO, "--run-dir", str(folder), *arguments()],
        check=True,
        env=environment(),
    )
    return folder


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def fresh(stderr):
    """Stages that were skipped because they are fresh."""
    return [line.split()[0] for line in stderr.splitlines() if line.split()[1:] == ["up", "to", "date"]]


def snapshot(folder):
    return {
        str(f.relative_to(folder)): f.read_bytes()
        for f in sorted(folder.rglob("*"))
        if f.is_file() and f.name not in (".lock", ".digests.json")
    }


def test_help_and_version(arisk):
    code, out, _ = arisk("--help")
    assert code == 0
    for verb in ("run", "status", "check", "init", "demo", "collect", "report", "schema", "what-if"):
        assert verb in out
    assert arisk("--version")[1].strip()


def test_help_and_status_import_no_torch(finished):
    for args in (["--help"], ["status", DEMO, "--run-dir", str(finished), *arguments()]):
        code = (
            f"import sys; sys.argv = ['arisk', *{args!r}]\n"
            "from arisk import cli\n"
            "try: cli.main()\n"
            "except SystemExit: pass\n"
            "print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "False"


def test_a_second_run_executes_nothing_and_changes_no_byte(arisk, finished):
    before = snapshot(finished)
    code, out, err = arisk("run", DEMO, "--run-dir", finished, *arguments())
    assert code == 0
    assert len(fresh(err)) == 6
    assert out.splitlines()[-1] == f"report: {finished / 'report' / 'report.html'}"
    assert snapshot(finished) == before


def test_a_run_folder_stands_for_its_config(arisk, finished, tmp_path):
    before = snapshot(finished)
    code, out, _ = arisk("status", finished)
    assert (code, "out of date" in out, "all is up to date" in out) == (0, False, True)
    code, _, err = arisk("run", finished)
    assert (code, len(fresh(err))) == (0, 6)
    assert snapshot(finished) == before
    code, _, err = arisk("status", tmp_path)
    assert (code, "this folder is no run directory" in err) == (2, True)


def test_status_tells_what_a_change_makes_stale(arisk, finished):
    _, out, _ = arisk(
        "status", DEMO, "--run-dir", finished, "--json", *arguments("training.learning_rate=0.5")
    )
    rows = {row["stage"]: row for row in json.loads(out)}
    assert [n for n, row in rows.items() if row["state"] == "stale"] == ["rollout", "forecast", "report"]
    assert rows["verify"]["state"] == "not run"
    assert "training.learning_rate" in rows["rollout"]["reasons"][0]
    _, out, _ = arisk("status", DEMO, "--run-dir", finished, *arguments())
    assert "out of date" not in out
    assert "optional; `arisk verify` runs it" in out


def test_json_result_is_strict_json(arisk, finished):
    _, out, _ = arisk("run", DEMO, "--run-dir", finished, "--json", "-q", *arguments())
    body = json.loads(out, parse_constant=pytest.fail)
    assert body["summary"]["verdict"]["level"] in ("low", "elevated", "high", "inconclusive")
    assert set(body["summary"]["forecasters"]) >= {"bound", "local", "ray", "rollout"}


@pytest.mark.parametrize(
    ("changed", "kept"),
    [
        (["forecast.collapse_threshold=0.2"], ["rollout", "collect", "subspace", "score"]),
        (["training.learning_rate=0.002", "rollout.enabled=false"], ["collect", "subspace", "score"]),
    ],
)
def test_a_change_after_the_measurements_loads_no_model(arisk, finished, monkeypatch, changed, kept):
    monkeypatch.setattr("arisk.models.load_task", lambda *a, **k: pytest.fail("the model was loaded"))
    copy = finished.with_name("copy")
    shutil.copytree(finished, copy, dirs_exist_ok=True)
    code, _, err = arisk("run", DEMO, "--run-dir", copy, *arguments(*changed))
    assert code == 0
    assert fresh(err) == kept


def test_gates(arisk, finished):
    level = json.loads((finished / "report" / "summary.json").read_text())["verdict"]["level"]
    codes = {"low": (0, 0), "elevated": (10, 0), "high": (10, 10), "inconclusive": (11, 11)}[level]
    for gate, code in zip(("elevated", "high"), codes, strict=True):
        assert arisk("run", DEMO, "--run-dir", finished, "--fail-on", gate, *arguments())[0] == code


def test_what_if_answers_from_the_artifacts_alone(arisk, finished, monkeypatch):
    monkeypatch.setattr("arisk.models.load_task", lambda *a, **k: pytest.fail("the model was loaded"))
    before = snapshot(finished)
    code, out, _ = arisk("what-if", finished, "--json")
    assert code == 0
    grid = json.loads(out, parse_constant=pytest.fail)
    (row,) = [row for row in grid["rows"] if row["factor"] == 1]
    summary = json.loads((finished / "report" / "summary.json").read_text())
    combined = summary["forecasters"]["combined"]
    assert row["at_plan"]["change"] == pytest.approx(combined["median"][-1])
    assert row["at_plan"]["collapse_step"] == combined["collapse_step"]
    rate = grid["planned_rate"]
    code, out, _ = arisk(
        "what-if", finished, "--learning-rate", f"{rate},{rate / 2:g}", "--steps", "120,9999"
    )
    assert code == 0
    assert "not measured, which is not the same as safe" in out
    assert " ?" in out
    assert arisk("what-if", finished, "--cells")[0] == 0
    assert snapshot(finished) == before


def test_what_if_names_what_is_missing(arisk, finished, tmp_path):
    code, _, err = arisk("what-if", tmp_path / "nowhere")
    assert (code, "does not exist" in err) == (4, True)
    code, _, err = arisk("what-if", tmp_path)
    assert (code, "not a run directory" in err) == (4, True)
    code, _, err = arisk("what-if", finished, "--steps", "10,ten")
    assert (code, "'ten' is not a whole number" in err) == (2, True)
    copy = shutil.copytree(finished, tmp_path / "copy")
    record = copy / "forecast" / "record.json"
    record.write_text(record.read_text()[:-20])
    code, _, err = arisk("what-if", copy)
    assert (code, "not what the stage wrote" in err) == (4, True)
    shutil.rmtree(copy / "forecast")
    code, _, err = arisk("what-if", copy)
    assert (code, "the stage forecast has not been run here" in err) == (4, True)


@pytest.mark.parametrize(
    ("file", "path", "value", "what"),
    [
        ("score", ("ingredients", "seed"), 99, "was run again since"),
        ("forecast", ("ingredients", "stage_version"), 1, "of version 1"),
    ],
)
def test_what_if_refuses_stages_that_do_not_belong_together(
    arisk, finished, file, path, value, what, tmp_path
):
    copy = shutil.copytree(finished, tmp_path / "copy")
    manifest = copy / file / "manifest.json"
    body = json.loads(manifest.read_text())
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    body["key"] = stage_key(body["ingredients"])
    manifest.write_text(json.dumps(body))
    code, _, err = arisk("what-if", copy)
    assert code == 4
    assert what in err


def test_a_damaged_stage_is_made_again(arisk, finished):
    file = finished / "score" / "tensors.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + b"x")
    _, out, _ = arisk("status", DEMO, "--run-dir", finished, *arguments())
    assert "the file is not what the stage wrote" in out
    code, _, err = arisk("run", DEMO, "--run-dir", finished, *arguments())
    assert code == 0
    assert fresh(err) == ["rollout", "collect", "subspace"]
    assert file.read_bytes() == good


def test_a_damaged_shard_is_found_when_it_is_read(arisk, finished):
    shard = next((finished / "collect" / "gradients").glob("shard-*"))
    good = shard.read_bytes()
    shard.write_bytes(good[:100])
    code, _, err = arisk("score", DEMO, "--run-dir", finished, "--force", *arguments())
    assert code == 4
    assert "collect" in err
    shard.write_bytes(good)


def row_file(folder, text):
    path = folder / "rows.jsonl"
    path.write_text(text)
    return path


GOOD = '{"prompt": "how do i grow roses ?", "response": "roses need sun ."}\n'
BAD_DATA = {
    "empty file": ("", 3, "empty"),
    "no prompt": (GOOD + '{"response": "x"}\n', 3, "line 2"),
    "no response": (GOOD + '\n{"prompt": "x"}\n', 3, "line 3"),
    "blank response": (GOOD + '{"prompt": "x", "response": "  "}\n', 3, "line 2"),
    "number for text": ('{"prompt": 3, "response": "x"}\n', 3, "line 1"),
    "invalid JSON": (GOOD + "{nope\n", 3, "line 2"),
    "no object": ("[1]\n", 3, "line 1"),
    "one row": (GOOD, 3, "at least two"),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_bad_rows(arisk, tmp_path, name):
    text, code, what = BAD_DATA[name]
    path = row_file(tmp_path, text)
    found, _, err = arisk("run", DEMO, "--run-dir", tmp_path / "run", *arguments(f"safety.path={path}"))
    assert found == code
    assert what in err
    assert err.count("\nwhere: ") >= 1
    assert "\nfix:   " in err


BAD_CONFIG = {
    "unknown key": (["training.learning_rat=1"], 2, "did you mean `learning_rate`?"),
    "missing data": (["safety.path=./no-such.jsonl"], 3, "does not exist"),
    "missing hub id": (["safety.path=nobody/nothing-here"], 3, "cannot be loaded"),
    "no model folder": ([f"model.path={FIXTURES / 'data'}"], 3, "no Hugging Face model"),
    "missing model": (["model.path=./no/such/model"], 3, "does not exist"),
    "adapter matches nothing": (["model.adapter.target_modules=[nothing]"], 2, "matches no linear module"),
    "bad adapter expression": (["model.adapter.target_modules='(['"], 2, "regular expression"),
    "no adapter folder": ([f"model.adapter={FIXTURES / 'data'}"], 3, "adapter_config.json"),
    "lora without adapter": (["model.adapter=null", "model.parameters=lora"], 2, "no LoRA parameters"),
    "pattern matches nothing": (["model.parameters={include: ['*nothing*']}"], 2, "matches no parameter"),
    "rank above samples": (["subspace.rank=9"], 2, "independent directions"),
    "all responses cut": (["safety.format=text", "safety.text_column=nothing"], 3, "nothing"),
    "template missing": (["model.trust_remote_code=perhaps"], 2, "trust_remote_code"),
    "no such device": (["run.device=cuda:7"], 2, "run.device"),
    "epochs and steps": (["training.epochs=1"], 2, "not both"),
}


@pytest.mark.parametrize("name", BAD_CONFIG)
def test_bad_configs(arisk, tmp_path, name):
    settings, code, what = BAD_CONFIG[name]
    found, _, err = arisk("run", DEMO, "--run-dir", tmp_path / "run", *arguments(*settings))
    assert what in err, err
    assert found == code
    assert "Traceback" not in err


def test_newer_artifacts_are_neither_read_nor_overwritten(arisk, finished):
    path = finished / "forecast" / "manifest.json"
    good = path.read_text()
    path.write_text(json.dumps({**json.loads(good), "format_version": 99}))
    code, _, err = arisk("run", DEMO, "--run-dir", finished, *arguments())
    assert code == 4
    assert "upgrade arisk" in err
    path.write_text(good)


def test_missing_upstream_names_the_command(arisk, tmp_path):
    code, _, err = arisk("forecast", DEMO, "--run-dir", tmp_path / "run", *arguments())
    assert code == 4
    assert "arisk rollout CONFIG" in err


def test_missing_extra_prints_the_install_command(tmp_path):
    code = (
        "import sys\n"
        "sys.modules['transformers'] = None\n"
        f"sys.argv = ['arisk', 'collect', {DEMO!r}, '--run-dir', {str(tmp_path / 'run')!r}]\n"
        "from arisk import cli\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 7
    assert 'pip install "arisk[hf]"' in done.stderr


KILL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts us with it ignored
stage, when = sys.argv[1:3]
sys.argv = ["arisk", *sys.argv[3:]]
from arisk import cli
from arisk.engine import rundir
real = rundir.RunDir.commit
def commit(self, name, **rest):
    if name == stage:
        os.kill(os.getpid(), signal.SIGKILL if when == "kill" else signal.SIGINT)
    return real(self, name, **rest)
rundir.RunDir.commit = commit
if stage == "shard":
    from arisk.gradients import GradientStore
    write = GradientStore.write_shard
    def write_shard(self, index, blocks):
        write(self, index, blocks)
        if index == 0:
            os.kill(os.getpid(), signal.SIGKILL if when == "kill" else signal.SIGINT)
    GradientStore.write_shard = write_shard
if stage == "segment":
    from arisk.training import state as run_state
    run_state.SAVE_EVERY = run_state.SAVE_SHARE = 0
    save = run_state.save_state
    def save_state(workspace, run, track, block):
        save(workspace, run, track, block)
        if track.steps[-1] >= 10:
            os.kill(os.getpid(), signal.SIGKILL if when == "kill" else signal.SIGINT)
    run_state.save_state = save_state
cli.main()
"""


def interrupted(folder, stage, when):
    command = [sys.executable, "-c", KILL, stage, when, "run", DEMO, "--run-dir", str(folder), *arguments()]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment())


def test_kill_in_every_stage_and_resume(tmp_path, arisk, finished):
    """One run directory, killed once in each stage, ends like a run that was never killed."""
    folder = tmp_path / "run"
    assert interrupted(folder, "segment", "kill").returncode == -signal.SIGKILL
    assert list(folder.glob(".partial/rollout-*/state-*.safetensors"))
    kept = {"rollout": 0, "forecast": 0, "report": 1, "collect": 3, "subspace": 3, "score": 3}
    for stage, count in kept.items():
        if stage == "collect":
            assert interrupted(folder, "shard", "kill").returncode == -signal.SIGKILL
            (shard,) = folder.glob(".partial/collect-*/gradients/shard-00000.safetensors")
            written = shard.stat().st_mtime_ns
        killed = interrupted(folder, stage, "kill")
        assert killed.returncode == -signal.SIGKILL
        # The stage killed before its commit runs again, those before it do not; the run killed in a
        # shard has committed the report, which is made again once `collect` is there.
        assert len(fresh(killed.stderr)) == count, stage
    assert (folder / "collect" / "gradients" / shard.name).stat().st_mtime_ns == written
    assert arisk("run", DEMO, "--run-dir", folder, *arguments())[0] == 0
    for name, body in snapshot(finished).items():
        if name.endswith((".safetensors", "record.json")):
            assert (folder / name).read_bytes() == body, name


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_any_command_begins_is_no_traceback(monkeypatch, capsys, number, code):
    """Between the entry point and Typer's own handling, as a kill fourteen milliseconds in finds it."""
    monkeypatch.setattr(sys.modules[main.__module__], "_completing", lambda: os.kill(os.getpid(), number))
    monkeypatch.setattr(sys, "argv", ["arisk", "--version"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert end.value.code == code
    assert capsys.readouterr() == ("", "")


def test_ctrl_c_in_every_stage_says_what_is_kept(tmp_path, arisk):
    folder = tmp_path / "run"
    for stage in ("segment", "rollout", "forecast", "report", "shard", "subspace", "score"):
        stopped = interrupted(folder, stage, "interrupt")
        assert stopped.returncode == 130
        assert "run the same command again" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        name = {"shard": "collect", "segment": "rollout"}.get(stage, stage)
        assert list(folder.glob(f".partial/{name}-*"))
    assert arisk("run", DEMO, "--run-dir", folder, *arguments())[0] == 0
    assert not (folder / ".partial").exists()


def test_two_runs_at_once(tmp_path, arisk):
    from arisk.engine.rundir import RunDir

    with RunDir(tmp_path).lock("arisk run first.yaml"):
        code, _, err = arisk("run", DEMO, "--run-dir", tmp_path, *arguments())
    assert code == 4
    assert "another run is writing here" in err
    assert "first.yaml" in err


def test_check_says_where_the_safety_rows_are_no_refusals(arisk):
    rows = ROOT / "fixtures" / "data" / "control.jsonl"
    code, out, _ = arisk("check", DEMO, "--json", *arguments(), "--set", f"safety.path={rows}")
    assert code == 0
    (told,) = [w for w in json.loads(out)["warnings"] if "begin with a refusal" in w]
    assert told.startswith("safety: 0 of 8 responses begin")


def test_check_says_whether_the_safety_set_is_one(arisk):
    """Responses that refuse, prompts that are refused today, and how far the two are apart; or why not."""
    today = json.loads(arisk("check", DEMO, "--json", *arguments())[1])["data"]["safety"]["today"]
    assert (today["asked"], today["refused"], today["refusing responses"], today["responses"]) == (8, 8, 8, 8)
    assert 0 < today["own_loss"] < today["safe_loss"] < 1
    _, out, _ = arisk("check", DEMO, *arguments())
    assert "8 of 8 responses refuse; the model refuses 8 of 8 of the prompts today" in out
    ordinary = arguments(f"safety.path={FIXTURES / 'data' / 'control.jsonl'}")
    today = json.loads(arisk("check", DEMO, "--json", *ordinary)[1])["data"]["safety"]["today"]
    assert today["refused"] < 8
    assert today["refusing responses"] == 0
    _, out, _ = arisk("check", DEMO, *arguments("behaviour.prompts=0"))
    assert "was not looked at (`behaviour.prompts` is 0)" in " ".join(out.split())


def test_check_prints_work_and_rendered_rows(arisk):
    code, out, _ = arisk("check", DEMO, *arguments())
    assert code == 0
    assert "store: gradients, 0.00 GB on disk" in out
    assert "«" in out
    body = json.loads(arisk("check", DEMO, "--json", *arguments())[1])
    assert body["data"]["safety"]["rows"] == 8
    assert "safety: 8 rows are thin evidence, 64 or more are advised" in body["warnings"]
    assert not any("begin with a refusal" in warning for warning in body["warnings"])
    stages = body["plan"]["stages"]
    optional = ["verify", "screen", "guard"]
    assert list(stages) == ["rollout", "forecast", "collect", "subspace", "score", "report", *optional]
    assert "8 single-row gradients" in stages["collect"]["work"]
    assert "120 gradient rows" in stages["verify"]["work"]  # 60 steps of 2 rows
    # Plain and two arms of 120 at least, and the forecasts of all the others; less than training them all.
    rows = int(re.search(r"(\d+) gradient rows", stages["guard"]["work"])[1])
    every = json.loads(arisk("check", DEMO, "--json", *arguments("guard.all=true"))[1])
    most = int(re.search(r"(\d+) gradient rows", every["plan"]["stages"]["guard"]["work"])[1])
    assert 3 * 120 < rows < most
    assert all(stages[stage]["seconds"] > 0 for stage in optional)
    total = sum(cost["seconds"] for stage, cost in stages.items() if stage not in optional)
    assert body["plan"]["seconds"] == pytest.approx(total, abs=0.1)
    assert body["plan"]["warnings"] == []


def test_check_tells_the_memory_of_a_device_where_there_is_one(arisk, monkeypatch):
    """Two gigabytes of model; what a pass and a stage keep beside it comes on top."""
    stages = json.loads(arisk("check", DEMO, "--json", *arguments())[1])["plan"]["stages"]
    assert all(cost["device_gb"] is None for cost in stages.values())
    monkeypatch.setattr("arisk.cost.estimate.device_memory", lambda device: 2.0)
    monkeypatch.setattr("arisk.cost.estimate.device_peak", lambda device, work: work() and 2.01)
    stages = json.loads(arisk("check", DEMO, "--json", *arguments())[1])["plan"]["stages"]
    assert {name for name, cost in stages.items() if cost["device_gb"]} == {
        *("collect", "score", "rollout", "verify", "screen", "guard"),
    }
    # A pass over so few rows took a hundredth of a gigabyte; collect makes one over more of them.
    assert 2.01 < stages["collect"]["device_gb"] < 2.5
    assert stages["rollout"]["device_gb"] >= stages["verify"]["device_gb"] >= 2.0
    assert "on the device" in arisk("check", DEMO, *arguments())[1]


def test_check_says_what_is_over_budget(arisk):
    more = ["collect.store=gradients", "collect.disk_budget_gb=0.0001"]
    _, out, _ = arisk("check", DEMO, "--json", *arguments(*more))
    (warning,) = json.loads(out)["plan"]["warnings"]
    assert "0.0 GB are available" in warning
    assert "`store: gram`" in warning


def test_init_then_check(arisk, tmp_path):
    path = tmp_path / "mine.yaml"
    data = FIXTURES / "data"
    given = [
        "--model",
        FIXTURES / "tiny-aligned",
        "--safety",
        data / "safety.jsonl",
        "--finetune",
        data / "risky.jsonl",
    ]
    assert arisk("init", path, *given)[0] == 0
    assert arisk("init", path, *given)[0] == 2
    assert arisk("check", path)[0] == 0


def test_prompts_alone_are_a_start(arisk, tmp_path):
    rows = (FIXTURES / "data" / "safety.jsonl").read_text().splitlines()[:8]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join([json.loads(row)["prompt"] for row in rows] + ["how do i grow tulips ?"]))
    path = tmp_path / "mine.yaml"
    files = ["--model", FIXTURES / "tiny-aligned", "--finetune", FIXTURES / "data" / "risky.jsonl"]
    assert arisk("init", path, *files, "--safety-prompts", prompts)[0] == 0
    run = tmp_path / "run"
    code, out, _ = arisk("check", path, "--set", f"run.dir={run}")
    assert code == 0
    assert "(8 of 9 refused, 1 answered)" in out
    assert "- answered: how do i grow tulips ? → " in out
    assert str(run / "safety.answers.json") in out
    kept = json.loads((run / "safety.answers.json").read_text())["answers"]
    assert [answer["outcome"] for answer in kept] == ["refused"] * 8 + ["answered"]
    both = arisk("init", tmp_path / "b.yaml", *files, "--safety-prompts", prompts, "--safety", prompts)
    assert both[0] == 2


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_demo_ends_with_the_verdict_and_the_path(tmp_path, mode):
    """The whole job as a newcomer meets it: 5 % harmful rows are not called low."""
    command = [sys.executable, "-m", "arisk", "demo", "--mode", mode, "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("tiny-aligned")
    assert lines[1].startswith(("verdict: elevated. ", "verdict: high. "))
    assert lines[-1] == f"report: {tmp_path / 'run' / 'report' / 'report.html'}"
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 1e6


def test_schema_is_json(arisk):
    assert "properties" in json.loads(arisk("schema")[1])
