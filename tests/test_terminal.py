from pathlib import Path

from arisk.display import StageDisplay
from arisk.pipeline import Outcome
from arisk.status import describe
from arisk.terminal import check_text, outcome_text, table


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
        "verdict": verdict,
        "forecasters": {"ray": curve, "rollout": {**curve, "status": "not_measured", "reason": "off"}},
        **changes,
    }


def test_what_was_not_measured_says_so_and_the_path_comes_last():
    text = outcome_text(Outcome(Path("runs/x"), ("report",), (), Path("runs/x/report.html"), summary()))
    assert "not measured: off" in text
    assert "none within 50" in text
    assert "safe-step budget: not measured of 50" in text
    assert text.splitlines()[-1] == "report: runs/x/report.html"
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


def test_status_and_check_as_text():
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
    text = check_text({"model": {"path": "m"}, "data": {"rows": ["one", "two"]}})
    assert text.splitlines() == ["model:", "  path: m", "data:", "  rows:", "    - one", "    - two"]
