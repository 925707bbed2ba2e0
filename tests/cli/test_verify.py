"""`arisk verify` on the embedded model: truth over forecast, staleness, kill and resume."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from arisk import cli
from arisk.config.yaml import load_config
from arisk.verification.stage import VERIFY, model_saver, refuse_saving
from tests.cli.test_cli import SMALL, environment

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "configs" / "demo.yaml")
SETTINGS = [
    *SMALL,
    "verify.safety.max_samples=6",
    "behaviour.prompts=3",
    "behaviour.ordinary_prompts=2",
    "behaviour.tokens=8",
]
STAGES = ["collect", "subspace", "score", "rollout", "forecast"]


def arguments(*extra):
    return [part for item in (*SETTINGS, *extra) for part in ("--set", item)]


@pytest.fixture
def arisk(arisk):
    """The command on these settings."""

    def call(verb, folder, *extra, settings=()):
        return arisk(verb, DEMO, "--run-dir", folder, *extra, *arguments(*settings))

    return call


@pytest.fixture(scope="module")
def forecast(tmp_path_factory):
    """A finished forecast."""
    folder = tmp_path_factory.mktemp("forecast") / "run"
    command = [sys.executable, "-m", "arisk", "run", DEMO, "--run-dir", str(folder), *arguments()]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    return folder


@pytest.fixture(scope="module")
def verified(forecast):
    """A forecast that was verified, and what the command printed."""
    folder = forecast.with_name("verified")
    shutil.copytree(forecast, folder)
    command = [sys.executable, "-m", "arisk", "verify", DEMO, "--run-dir", str(folder), *arguments()]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment())
    return folder, done.stdout


@pytest.fixture
def run(verified, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(verified[0], tmp_path / "run"))


def state(arisk, folder, *settings):
    rows = json.loads(arisk("status", folder, "--json", settings=settings)[1])
    return {row["stage"]: row["state"] for row in rows if row["stage"] != "screen"}


def summary(folder):
    return json.loads((folder / "report" / "summary.json").read_text(), parse_constant=pytest.fail)


def test_it_prints_forecast_and_truth_and_ends_with_the_report(verified):
    folder, out = verified
    body = summary(folder)["verify"]
    lines = out.splitlines()
    assert lines[:2] == [body["refusal_sentence"], body["sentence"]]
    assert lines[-1] == f"report: {folder / 'report' / 'report.html'}"
    cells = {line.split("  ")[0]: line for line in lines}
    real = body["real_collapse"]
    assert cells["collapse step"].endswith("none within 60" if real is None else str(real))
    assert cells["refusals at the start"].endswith("3 of 3")
    assert body["refusals"][0]["refused"] == 3
    assert body["heldout"] is True
    assert body["safety_samples"] == 6
    assert body["last_step"] == body["horizon"] == 60
    assert f"{body['inside_share']:.0%} of the measured steps" in out
    page = (folder / "report" / "report.html").read_text()
    assert 'id="verify"' in page
    assert "Verified by a real fine-tune" in (folder / "report" / "summary.md").read_text()


def test_the_truth_is_that_of_training_the_model_oneself(verified):
    """The model loaded anew, torch's own AdamW, the rows in planned order, losses of held-out rows."""
    import torch

    from arisk.config.yaml import load_config
    from arisk.models import load_task

    task = load_task(load_config(Path(DEMO), SETTINGS), device=torch.device("cpu"))
    parameters = [dict(task.model.named_parameters())[name] for name in task.parameter_names]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)

    def mean():
        with torch.no_grad():
            losses = [task.heldout.loss_fn(task.model, batch) for batch in task.heldout.batches]
        return float(torch.cat(losses).double().mean())

    start, found = mean(), {0: 0.0}
    for step, batch in zip(range(1, 61), task.finetune.batches, strict=False):
        optimizer.zero_grad()
        # The mean over the step's trained tokens, as transformers computes it.
        kept = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
        task.model(**kept).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        found[step] = mean() - start
    body = summary(verified[0])["verify"]
    assert [found[step] for step in body["steps"]] == pytest.approx(body["safety"], rel=1e-3, abs=1e-5)
    assert max(body["safety"]) > 0.01


def test_a_second_time_does_nothing_and_json_is_strict(arisk, run, monkeypatch):
    monkeypatch.setattr("arisk.models.load_task", lambda *a, **k: pytest.fail("the model was loaded"))
    before = {f: f.read_bytes() for f in run.rglob("*") if f.is_file() and f.name != ".digests.json"}
    code, out, err = arisk("verify", run, "--json")
    assert code == 0
    body = json.loads(out, parse_constant=pytest.fail)
    assert body["ran"] is False
    assert body["verify"] == summary(run)["verify"]
    assert all(line.endswith("up to date") for line in err.splitlines())
    assert {f: f.read_bytes() for f in before} == before
    assert {what for name, what in state(arisk, run).items() if name != "guard"} == {"fresh"}
    assert arisk("run", run)[0] == 0
    assert {f: f.read_bytes() for f in before} == before


def test_a_run_never_verifies(arisk, forecast):
    fresh = dict.fromkeys([*STAGES, "report"], "fresh")
    assert state(arisk, forecast) == {**fresh, "verify": "not run", "guard": "not run"}
    _, out, _ = arisk("status", forecast)
    assert "optional; `arisk verify` runs it" in out
    assert summary(forecast)["verify"] is None
    code, _, err = arisk("run", forecast, "--force")
    assert code == 0
    assert "verify" not in err
    assert not (forecast / "verify").exists()


def test_another_plan_does_not_show_the_truth_of_this_one(arisk, run):
    other = ["training.learning_rate=0.0005"]
    found = state(arisk, run, *other)
    assert {name for name, what in found.items() if what == "stale"} == {
        *("rollout", "forecast", "verify", "report")
    }
    _, out, _ = arisk("status", run, settings=other)
    assert "verify is not up to date" in out
    assert arisk("run", run, settings=other)[0] == 0
    assert summary(run)["verify"] is None
    assert state(arisk, run, *other)["verify"] == "stale"
    # Back to the first plan: its truth is still there.
    assert arisk("run", run)[0] == 0
    assert summary(run)["verify"]["last_step"] == 60


def test_threshold_and_markers_need_no_new_fine_tune(arisk, run, monkeypatch):
    monkeypatch.setattr("arisk.models.load_task", lambda *a, **k: pytest.fail("the model was loaded"))
    settings = ["forecast.collapse_threshold=0.01", "behaviour.refusal_openings=[shop]"]
    code, out, _ = arisk("verify", run, settings=settings)
    assert code == 0
    assert "no report: stage forecast is not up to date" in out
    assert "next: arisk run" in out
    assert "no forecast to compare it with" in out
    assert arisk("run", run, settings=settings)[0] == 0
    body = summary(run)["verify"]
    assert body["threshold"] == 0.01
    assert body["real_collapse"] is not None


def test_stopping_early(arisk, run):
    """A short check stays with the plan; asked for more, it goes on; asked for less, it has enough."""
    code, out, err = arisk("verify", run, "--steps", "5")
    assert code == 0
    assert "after 60 of 60 steps" in out
    assert "verify    up to date" in err
    code, out, _ = arisk("verify", run, "--steps", "5", "--force")
    assert code == 0
    assert "after 5 of 60 steps" in out
    assert {what for name, what in state(arisk, run).items() if name != "guard"} == {"fresh"}
    assert summary(run)["verify"]["last_step"] == 5
    body = json.loads(arisk("verify", run, "--steps", "8", "--json", "-q")[1])
    assert body["ran"] is True
    assert body["verify"]["last_step"] == 8
    assert arisk("verify", run, "--steps", "0")[0] == 2


def test_without_a_forecast_it_says_what_to_run(arisk, tmp_path):
    code, out, _ = arisk("verify", tmp_path / "run", "--steps", "3", settings=["behaviour.prompts=0"])
    assert code == 0
    assert "no report: stage rollout is not up to date; next: arisk run" in out
    assert "refusals not measured: behaviour.prompts is 0" in out
    body = json.loads(
        arisk("verify", tmp_path / "run", "--steps", "3", "--json", settings=["behaviour.prompts=0"])[1]
    )
    assert body["ran"] is False
    assert (body["report"], body["missing"]) == (None, "rollout")
    assert body["verify"]["refusals_missing"] == "behaviour.prompts is 0"
    assert body["verify"]["error_factor"] is None


def test_rows_that_are_not_held_out_are_said_to_be(arisk, tmp_path):
    settings = ["verify.safety=null", "control=null"]
    _, out, _ = arisk("verify", tmp_path / "run", "--steps", "2", settings=settings)
    assert "caveat: The safety rows are those that the forecast used: they are not held out." in out
    assert "caveat: No control data" in out


def test_mistakes_are_one_clear_error(arisk, tmp_path):
    for settings, code, what in (
        (["verify.safety.path=./no-such.jsonl"], 3, "verify.safety.path"),
        (["verify.step=3"], 2, "did you mean `steps`?"),
        (["model={source: python, entry: 'a.py:b'}"], 2, "Task.heldout"),
    ):
        found, _, err = arisk("verify", tmp_path / "run", settings=settings)
        assert found == code, err
        assert what in err
        assert "Traceback" not in err


TASK = """
import torch
from torch import nn
from arisk import SampleSet, Task

def loss(model, batch):
    x, y = batch
    return nn.functional.cross_entropy(model(x), y, reduction="none")

def data(seed):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 5, generator=g), torch.randint(3, (4,), generator=g)) for _ in range(5)]

def make():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    sets = {name: SampleSet(name, data(i), loss) for i, name in enumerate(("safety", "finetune", "heldout"))}
    return Task(model=model, parameter_names=["weight", "bias"], **sets)
"""


def test_a_python_task_counts_no_refusals(monkeypatch, capsys, tmp_path):
    (tmp_path / "tasks.py").write_text(TASK)
    config = tmp_path / "c.yaml"
    config.write_text(
        f"model: {{source: python, entry: '{tmp_path}/tasks.py:make'}}\ntraining: {{max_steps: 9}}\n"
    )
    monkeypatch.setattr(
        sys, "argv", ["arisk", "verify", str(config), "--run-dir", str(tmp_path / "run"), "--json"]
    )
    cli.app(standalone_mode=False)
    body = json.loads(capsys.readouterr().out)["verify"]
    assert body["refusals"] == []
    assert "no tokenizer" in body["refusals_missing"]
    assert body["heldout"] is True
    assert body["steps"] == list(range(10))


KILL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell starts us with it ignored
when = sys.argv[1]
sys.argv = ["arisk", *sys.argv[2:]]
from arisk.training import state as run_state
run_state.SAVE_EVERY = run_state.SAVE_SHARE = 0
save = run_state.save_state
def save_state(workspace, run, track, block):
    save(workspace, run, track, block)
    if track.at == 31:
        os.kill(os.getpid(), getattr(signal, when))
run_state.save_state = save_state
from arisk import cli
cli.main()
"""


@pytest.mark.parametrize("when", ["SIGKILL", "SIGINT"])
def test_killed_in_the_middle_it_goes_on_and_ends_the_same(forecast, verified, tmp_path, when):
    folder = Path(shutil.copytree(forecast, tmp_path / "run"))
    common = [DEMO, "--run-dir", str(folder), *arguments()]
    command = [sys.executable, "-c", KILL, when, "verify", *common]
    killed = subprocess.run(command, check=False, capture_output=True, text=True, env=environment())
    assert killed.returncode == (-signal.SIGKILL if when == "SIGKILL" else 130)
    if when == "SIGINT":
        assert "run the same command again" in killed.stderr
    assert list(folder.glob(".partial/verify-*/state-31.safetensors"))
    assert not (folder / "verify").exists()
    status = subprocess.run(
        [sys.executable, "-m", "arisk", "status", *common], check=True, capture_output=True, text=True
    )
    assert "resumes what a killed run left" in status.stdout
    assert "out of date" not in status.stdout
    again = subprocess.run(
        [sys.executable, "-m", "arisk", "verify", *common], check=True, capture_output=True, env=environment()
    )
    assert again.returncode == 0
    for name in ("tensors.safetensors", "record.json"):
        assert (folder / "verify" / name).read_bytes() == (verified[0] / "verify" / name).read_bytes()
    assert not (folder / ".partial").exists()
    assert {file.name for file in (folder / "verify").iterdir()} == {
        *("tensors.safetensors", "record.json", "manifest.json")
    }
    assert summary(folder)["verify"] == summary(verified[0])["verify"]


def test_the_tuned_model_is_kept(verified, arisk, tmp_path):
    """The folder holds the adapter of the last step, also where the stage was fresh already."""
    import torch

    from arisk.base.artifacts import read_record
    from arisk.config.yaml import load_config
    from arisk.models.tasks import load_task
    from arisk.training.panels import panel_of
    from arisk.verification.record import VerifyResult

    run, kept = tmp_path / "run", tmp_path / "kept"
    shutil.copytree(verified[0], run)
    code, _, err = arisk("verify", run, "--save-model", kept, "--steps", "2")
    assert code == 0, err
    assert str(kept) in err
    told = read_record(run / "verify", VerifyResult)
    assert told.last == 2

    task = load_task(
        load_config(Path(DEMO), [*SETTINGS, f"model.adapter={{path: {kept}}}"]), device=torch.device("cpu")
    )
    assert task.heldout is not None
    task.model.eval()
    losses = panel_of(task.heldout, None, torch.device("cpu")).losses(task.model)
    moved = told.safety[:, -1]
    assert float(moved.abs().max()) > 1e-4
    assert float(losses.mean()) == pytest.approx(told.start + float(moved.mean()), abs=1e-5)
    assert (kept / "tokenizer_config.json").is_file()

    code, _, err = arisk("verify", run, "--save-model", kept, "--steps", "2")
    assert code == 2
    assert "is not empty" in err
    code, _, err = arisk("verify", run, "--save-model", " ")
    assert code == 2
    assert "has no name" in err


@pytest.mark.parametrize("name", ["a #b", '"quoted"', "null", "123", "ä: b", "~nobody-of-that-name"])
def test_the_folder_for_the_model_is_meant_to_the_letter(tmp_path, name):
    option = VERIFY.options[-1]
    (tmp_path / "c.yaml").write_text("model: {source: python, entry: 'a:b'}\n", encoding="utf-8")
    setting = f"{option.setting}={option.parse(str(tmp_path / name))}"
    assert load_config(tmp_path / "c.yaml", [setting]).verify.save_model == tmp_path / name


def test_a_model_is_kept_whole_or_not_at_all(tmp_path, monkeypatch):
    folder, saved = tmp_path / "kept", []

    def save(model, config, place):
        place.mkdir()
        (place / "adapter").touch()
        saved.append(place)
        if len(saved) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("arisk.models.loading.save_tuned", save)
    job = SimpleNamespace(config=SimpleNamespace(model=None), show=SimpleNamespace(note=saved.append))
    keep = model_saver(job, folder)
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        keep(None)
    # Nothing that a loader takes for a model, and nothing that stands in the way of the same command.
    assert [file.name for file in folder.iterdir()] == [".partial"]
    refuse_saving(SimpleNamespace(model=SimpleNamespace(source="hf")), folder, "verify.save_model")
    keep(None)
    assert [file.name for file in folder.iterdir()] == ["adapter"]
    assert [place.name for place in tmp_path.iterdir()] == ["kept"]


def test_a_model_is_kept_through_a_link_and_in_the_folder_at_hand(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")

    def save(model, config, place):
        place.mkdir()
        (place / "adapter").touch()

    monkeypatch.setattr("arisk.models.loading.save_tuned", save)
    job = SimpleNamespace(config=SimpleNamespace(model=None), show=SimpleNamespace(note=lambda _: None))
    model_saver(job, tmp_path / "link")(None)
    assert [file.name for file in (tmp_path / "real").iterdir()] == ["adapter"]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model_saver(job, Path())(None)
    assert [file.name for file in Path().iterdir()] == ["adapter"]


def test_a_task_from_python_keeps_no_model(monkeypatch, capsys, tmp_path):
    (tmp_path / "tasks.py").write_text(TASK)
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {{source: python, entry: '{tmp_path}/tasks.py:make'}}\n")
    given = ["--run-dir", tmp_path / "run", "--save-model", tmp_path / "kept"]
    monkeypatch.setattr(sys, "argv", ["arisk", "verify", *map(str, [config, *given])])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "task from Python" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()
