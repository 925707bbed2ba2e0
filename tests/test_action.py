"""The composite action and the hook: what they call is there, and what must run after a failed gate does."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / ".github" / "actions" / "arisk" / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}


def test_every_input_that_is_used_is_declared_and_the_other_way_round():
    text = str(ACTION["runs"]) + str(ACTION["outputs"])
    used = set(re.findall(r"inputs\.([a-z-]+)", text))
    assert used == set(ACTION["inputs"])
    assert ACTION["runs"]["using"] == "composite"
    assert all("shell" in step for step in STEPS.values() if "run" in step)


def test_texts_of_callers_reach_the_shell_by_the_environment_alone():
    for step in STEPS.values():
        assert "${{" not in step.get("run", ""), step["name"]


def test_what_follows_a_failed_gate_always_runs():
    names = list(STEPS)
    after = names[names.index("Forecast") + 1 :]
    assert after == ["Show the verdict", "Keep the report", "Keep the run directory"]
    assert all(STEPS[name]["if"] == "always()" for name in after)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"FAIL_ON": "high", "ARGS": "--set a=b --why off"},
            ["--fail-on", "high", "--set", "a=b", "--why", "off"],
        ),
        ({"FAIL_ON": "", "ARGS": ""}, []),
    ],
)
def test_the_command_line_is_what_the_inputs_say(tmp_path, settings, words):
    (tmp_path / "arisk").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "arisk").chmod(0o755)
    given = {"CONFIG": "my plan.yaml", "RUN_DIR": "runs/x", "PATH": f"{tmp_path}:/usr/bin:/bin", **settings}
    done = subprocess.run(
        ["bash", "-euc", STEPS["Forecast"]["run"]], env=given, check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["run", "my plan.yaml", "--run-dir", "runs/x", *words]


@pytest.mark.parametrize(
    ("package", "installed"),
    [
        ("", f"arisk[hf] @ file://{ROOT}"),
        ("git+https://host/arisk@v1", "arisk[hf] @ git+https://host/arisk@v1"),
        ("a wheel.whl", "arisk[hf] @ file://{here}/a wheel.whl"),
    ],
)
def test_what_is_installed_is_this_checkout_or_what_was_named(tmp_path, package, installed):
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "a wheel.whl").touch()
    here = str(ROOT / ".github" / "actions" / "arisk")
    done = subprocess.run(
        ["bash", "-euc", STEPS["Install arisk"]["run"]],
        env={"PACKAGE": package, "HERE": here, "PATH": f"{tmp_path}:/usr/bin:/bin"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == ["-m", "pip", "install", installed.format(here=tmp_path)]


def test_the_hook_checks_every_plan_and_fails_with_the_first(tmp_path):
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert re.search(hook["files"], "plans/arisk-7b.yaml")
    assert not re.search(hook["files"], "axolotl.yaml")
    (tmp_path / "arisk").write_text('#!/bin/sh\necho "$@"\ntest "$2" != bad.yaml\n')
    (tmp_path / "arisk").chmod(0o755)
    done = subprocess.run(
        [*shlex.split(hook["entry"]), "a b.yaml", "bad.yaml", "c.yaml"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "check a b.yaml\ncheck bad.yaml\n")
