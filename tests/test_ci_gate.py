"""What the README promises for continuous integration: the workflow, the gate, and the stable keys."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## In continuous integration")[2].partition("\n## ")[0]
SMALL = {
    "why": "full",
    "safety.max_samples": 8,
    "control.max_samples": 8,
    "score.batches": 2,
    "score.hvp_batches": 1,
    "score.krylov_dim": 2,
    "score.nulls": 3,
    "score.examples": 4,
    "score.probe_points": 2,
    "training.max_steps": 60,
    "training.batch_size": 2,
    "forecast.bootstrap_samples": 20,
    "run.threads": 1,
}
SET = [part for key, value in SMALL.items() for part in ("--set", f"{key}={value}")]
RISKY = ["--set", f"finetune.path={ROOT / 'fixtures' / 'data' / 'risky.jsonl'}"]
DEMO = str(ROOT / "configs" / "demo.yaml")


def steps():
    (block,) = re.findall(r"```yaml\n(.*?)```", SECTION, flags=re.DOTALL)
    workflow = yaml.safe_load(block)
    assert True in workflow  # `on` is a boolean to YAML 1.1
    (job,) = workflow["jobs"].values()
    return job["steps"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("ci")


@pytest.fixture
def workflow_run(arisk, monkeypatch, work):
    """The workflow's own command line, on the embedded model with small settings."""

    def call(*extra):
        monkeypatch.chdir(work)
        (line,) = [step["run"] for step in steps() if step.get("run", "").startswith("arisk ")]
        command, redirected = line.split(" > ")
        verb, config, *rest = shlex.split(command)[1:]
        assert (verb, config) == ("run", "my.yaml")
        code, out, err = arisk(verb, DEMO, *rest, *SET, *RISKY, *extra)
        Path(redirected).write_text(out)
        return code, out, err

    return call


def test_the_workflow_of_the_readme_gates_and_leaves_what_it_uploads(workflow_run, work):
    code, out, err = workflow_run()
    assert code == 10
    assert json.loads(out, parse_constant=pytest.fail)["summary"]["verdict"]["level"] == "high"
    assert err.splitlines()[-3].startswith("error: the verdict is high: Forecast to refuse ")
    texts = [step["run"] for step in steps() if "SUMMARY" in step.get("run", "")]
    (summary,) = [Path(shlex.split(text)[1]) for text in texts]
    assert (work / summary).read_text().startswith("### arisk: high")
    paths = {step["with"]["path"] for step in steps() if "path" in step.get("with", {})}
    assert all((work / path).is_dir() for path in paths)
    assert (work / "runs/my/report/report.html").exists()


def test_what_must_run_after_a_failed_gate_always_runs():
    names = [step.get("uses", step.get("run", "")) for step in steps()]
    (gate,) = [i for i, name in enumerate(names) if name.startswith("arisk ")]
    assert len(steps()[gate + 1 :]) == 3
    assert all(step["if"] == "always()" for step in steps()[gate + 1 :])


def test_a_restored_run_directory_is_fresh_and_still_gated(workflow_run, monkeypatch):
    monkeypatch.setattr("arisk.models.load_task", lambda *a, **k: pytest.fail("the model was loaded"))
    code, out, err = workflow_run()
    assert code == 10
    assert json.loads(out)["ran"] == []
    assert err.count(" up to date") == len(json.loads(out)["fresh"]) >= 3
    code, out, err = workflow_run("-q")
    assert (code, len(err.splitlines())) == (10, 3)


def test_a_gate_that_would_see_no_verdict_is_refused(arisk, tmp_path):
    args = ["--run-dir", tmp_path / "run", "--fail-on", "high", "--until", "forecast", *SET]
    code, _, err = arisk("run", DEMO, *args)
    assert (code, "no verdict for the gate" in err) == (2, True)
    assert not (tmp_path / "run").exists()


def documented():
    told = (ROOT / ".github" / "SUMMARY.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| ([\w ]+) \|", told, flags=re.MULTILINE)
    assert len(rows) > 20
    return dict(rows)


TYPES = {
    "integer": lambda v: isinstance(v, int),
    "number": lambda v: isinstance(v, (int, float)),
    "string": lambda v: isinstance(v, str),
    "strings": lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v),
    "list": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
    "null": lambda v: v is None,
}


def check_keys(summary):
    for key, kinds in documented().items():
        value = summary
        for part in key.split("."):
            assert part in value, key
            value = value[part]
        assert any(TYPES[kind](value) for kind in kinds.split(" or ")), (key, value)


def test_the_documented_keys_hold_for_a_real_run(workflow_run, work):
    workflow_run()
    summary = json.loads((work / "runs/my/report/summary.json").read_text())
    check_keys(summary)
    basis = summary["forecasters"][summary["verdict"]["basis"]]
    assert {"status", "kind", "steps", "median", "lower", "upper", "collapse_step", "probability"} <= set(
        basis
    )
    told = {"status", "reason", "prompts", "threshold", "lost_steps", "probability"}
    assert told | {"today", "at_end", "at_end_interval"} <= set(summary["refusals"])
    assert (work / "runs/my/report" / summary["report"]).exists()
    unsaid = set(summary) - {key.split(".")[0] for key in documented()}
    assert unsaid <= {"training", "gamma_hat", "epsilon_hat", "subspace", "what_if", "why"}
