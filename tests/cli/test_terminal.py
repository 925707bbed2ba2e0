import sys
from contextlib import suppress
from pathlib import Path

from arisk.base.terminal import StageDisplay, table
from arisk.cli import main
from arisk.cost.check import check_text, shortened
from arisk.engine.freshness import describe
from arisk.engine.run import Outcome
from arisk.forecast.text import outcome_text


def test_table_is_aligned():
    lines = table([["a", "long cell"], ["bbb", "c"]], ["x", "y"]).splitlines()
    assert lines == ["x    y", "---  ---------", "a    long cell", "bbb  c"]


def summary(**changes):
    curve = {
        "status": "measured",
        "reason": None,
        "kind": "forecast",
        "collapse_step": None,
        "horizon": 50,
        "probability": None,
        "median": [0.0, None],
        "trusted_until": None,
    }
    verdict = {
        "level": "inconclusive",
        "sentence": "s",
        "safe_steps": None,
        "horizon": 50,
        "basis": "ray",
        "reasons": ["r"],
        "caveats": [],
    }
    return {
        "identity": "tiny on rows.jsonl",
        "evidence": "safe-step budget not measured; 9 safety rows, thin",
        "advice": [
            {"sentence": "Measure more.", "command": "arisk verify my.yaml"},
            {"sentence": "Or less.", "command": ""},
        ],
        "verdict": verdict,
        "forecasters": {"ray": curve, "rollout": {**curve, "status": "not_measured", "reason": "off"}},
        **changes,
    }


def test_what_was_not_measured_says_so_and_the_path_comes_last():
    outcome = Outcome(Path("runs/x"), ("report",), (), Path("runs/x/report.html"), summary())
    assert outcome_text(outcome).splitlines() == [
        "tiny on rows.jsonl",
        "verdict: inconclusive. s r",
        "evidence: safe-step budget not measured; 9 safety rows, thin",
        "to do: Measure more. arisk verify my.yaml",
        "report: runs/x/report.html",
    ]
    text = outcome_text(outcome, every=True)
    assert "not measured: off" in text
    assert "none within 50" in text
    assert "to do: Or less.\n" in text
    assert "because: r" in text
    assert text.splitlines()[-1] == "report: runs/x/report.html"
    assert "why" not in text
    told = {"findings": ["first", "second"], "missing": None}
    outcome = Outcome(Path("runs/x"), ("report",), (), Path("runs/x/report.html"), summary(why=told))
    assert outcome_text(outcome, verdict=False).splitlines() == ["why: first", "report: runs/x/report.html"]
    assert "why: second" in outcome_text(outcome, every=True)
    assert "\x1b" not in text


def test_a_partial_run_names_its_folder():
    assert "runs/x" in outcome_text(Outcome(Path("runs/x"), (), ("collect",), None, None))


def test_progress_is_quiet_in_a_pipe(capsys):
    show = StageDisplay()
    show.start("collect", "not run yet")
    for done in range(100):
        show.progress("safety gradients", done, 100)
    show.finish("collect")
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 2
    quiet = StageDisplay(quiet=True)
    quiet.start("collect", "")
    quiet.finish("collect")
    quiet.skip("score")
    assert capsys.readouterr() == ("", "")


def test_a_pipe_gets_a_sign_of_life_every_minute(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("arisk.base.terminal.time.monotonic", lambda: now[0])
    show = StageDisplay()
    show.planned(["rollout"])
    show.start("rollout", "not run yet")
    for done in range(11):
        show.progress("virtual run", done, 10)
        now[0] += 15
    show.finish("rollout")
    first, *beats, last = capsys.readouterr().err.splitlines()
    assert first == "stage 1 of 1 rollout   running (not run yet)"
    assert "done in" in last
    assert [beat.split(" · ")[0] for beat in beats] == [
        "stage 1 of 1 rollout   virtual run 4/10",
        "stage 1 of 1 rollout   virtual run 8/10",
    ]
    assert "left" in beats[0]


def test_usage_names_arguments_as_they_are(capsys, monkeypatch):
    for verb, usage in (("run", "run [OPTIONS] config"), ("compare", "compare [OPTIONS] RUN_OR_CONFIG…")):
        monkeypatch.setattr(sys, "argv", ["arisk", verb, "--help"])
        with suppress(SystemExit):
            main()
        first = capsys.readouterr().out.splitlines()[0]
        assert usage in first
        assert "{" not in first


def checked(row):
    facts = {
        "rows": 3,
        "duplicates": 1,
        "tokens_mean": 26.26,
        "tokens_max": 40,
        "response_tokens_mean": 12.0,
        "response_tokens_min": 2,
        "prompts_truncated": 2,
        "responses_truncated": 0,
        "rendered rows": [row, "second"],
    }
    cost = {"seconds": 90.0, "memory_gb": 1.5, "disk_gb": 0.0, "flop": 2.5e12, "work": "96 gradients"}
    return {
        "model": {"path": "m", "parameters": "12"},
        "data": {"safety": facts},
        "warnings": ["few rows"],
        "work": {"rollout": "68 of 200", "disk": "1 GB"},
        "plan": {"stages": {"collect": cost}, "seconds": 90.0, "memory_gb": 1.5, "warnings": ["too big"]},
    }


def test_check_shows_data_rows_and_the_plan():
    lines = check_text(checked("<user> a «b»")).splitlines()
    assert lines[:2] == ["path: m", "parameters: 12"]
    assert "safety  3     1         26.3 (40)         12.0 (2)             2" in lines
    assert "- safety: <user> a «b»" in lines
    assert "warning: few rows" in lines
    assert any(
        line.split() == ["collect", "1:30", "1.50", "GB", "–", "2.5", "TFLOP", "96", "gradients"]
        for line in lines
    )
    assert lines[-2:] == [
        "arisk run: about 1:30, peak memory about 1.50 GB",
        "warning: too big",
    ]


def test_long_rows_keep_head_and_response():
    text = "<user> " + "x" * 2000 + " «the safe response»"
    lines = check_text(checked(text)).splitlines()
    line = next(line for line in lines if line.startswith("- safety: <user>"))
    assert len(line) <= 400
    assert line.endswith("«the safe response»")
    assert shortened("short", 10) == "short"


def test_a_python_task_tells_what_it_knows():
    assert check_text({"model": {"entry": "m:f"}, "data": {"safety": 3}}).splitlines() == [
        "entry: m:f",
        "",
        "safety: 3 rows",
    ]


def test_status_as_text():
    rows = [
        {
            "stage": "collect",
            "fresh": False,
            "optional": False,
            "state": "stale",
            "reasons": ["a: 1 → 2"],
            "seconds": None,
            "bytes": 0,
            "partial": True,
        }
    ]
    assert "a: 1 → 2 (resumes" in describe(rows)
