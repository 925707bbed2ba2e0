"""The campaign in small: one case of every class. `just fuzz MINUTES` goes on with other seeds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits for children as Linux does")
def test_a_case_of_every_class_ends_as_it_should(tmp_path):
    command = [sys.executable, "-m", "tests.faults.fuzz", "--tries", "1", "--seed", "7", "--keep", tmp_path]
    done = subprocess.run(
        command,
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
    assert "kills" in done.stdout


@pytest.mark.parametrize(
    ("code", "err", "kind"),
    [
        (1, "", "exit code"),
        (1, "error: this is a bug of arisk, not your fault", "bug"),
        (2, "Traceback (most recent call last)\n  File x\nKeyError: 1", "traceback"),
        (-11, "", "signal"),
        (3, "error: what", "error"),
        (3, "Loading shards\nerror: a\nwhere: b\nfix:   c\n", "foreign line"),
        (3, "error: the model cannot be loaded: 'added_tokens'\nwhere: b\nfix:   c\n", "unclear"),
        (3, f"error: {'a' * 10_000}\nwhere: b\nfix:   c\n", "too long"),
        (0, "\x1b]0;t\x07", "terminal"),
    ],
)
def test_the_judge_sees_what_may_never_happen(tmp_path, code, err, kind):
    sys.path.insert(0, str(ROOT))
    from tests.faults.fuzz import Ending, judged
    from tests.faults.harm import Case, Place

    faults = judged(Ending(code, "", err), Case(["check"]), Place(tmp_path))
    assert kind in [fault.partition(":")[0] for fault in faults]
    assert judged(Ending(0, "fine\n", ""), Case(["check"]), Place(tmp_path)) == []
