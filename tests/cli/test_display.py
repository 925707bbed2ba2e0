"""The terminal as people meet it: a real pseudo-terminal of two sizes, and a pipe."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

#: A run of two stages on a folder, with nothing behind it: what the display does is all that is real.
FAKE = """
import fcntl, signal, sys, termios, time
if sys.stdin.isatty():
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches this program
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "arisk"
from pathlib import Path
from arisk.cli import app, main
from arisk.cli.options import show
from arisk.engine.rundir import RunDir
@app.command("fake")
def fake(folder: Path, wait: bool = False, quiet: bool = False):
    with RunDir(folder).lock("arisk fake"):
        display = show(quiet)
        display.planned(["collect", "score"])
        try:
            for stage in ("collect", "score"):
                display.start(stage, "training.learning_rate: 0.0001 → 0.0002; " * 4)
                for done in range(6):
                    display.progress("a label that is rather long for what it says " * 2, done, 5)
                    time.sleep(0.03)
                while wait:
                    time.sleep(0.05)
                display.finish(stage)
        except KeyboardInterrupt:
            display.interrupted()
            raise
main()
"""


def environment(**changes):
    return {**os.environ, "TERM": "xterm", "COLUMNS": "", **changes}


def in_terminal(arguments, columns, rows, *, send=None, after=b"collect", **changes):
    """Run a program on a pseudo-terminal; its exit code and what it wrote."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    child = subprocess.Popen(
        arguments,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env=environment(**changes),
    )
    os.close(slave)
    said, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([master], [], [], 0.2)[0]:
            try:
                data = os.read(master, 65536)
            except OSError:  # how Linux tells the end
                break
            if not data:
                break
            said += data
        if send is not None and after in said:
            os.write(master, send)
            send = None
    os.close(master)
    return child.wait(timeout=30), said.decode()


def fake(*arguments):
    return [sys.executable, "-c", FAKE, "fake", *map(str, arguments)]


def screen(said):
    """What stays on the screen: every line as it is after its last renewal."""
    lines = said.replace("\r\n", "\n").split("\n")
    return [re.split(r"\r\x1b\[2K", line)[-1] for line in lines]


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 50)])
def test_no_line_is_wider_than_the_terminal_and_the_end_is_clean(tmp_path, columns, rows):
    code, said = in_terminal(fake(tmp_path / "run"), columns, rows)
    assert code == 0
    for part in re.split(r"\r\x1b\[2K|\r\n", said):
        assert len(part) < columns
        assert "\x1b" not in part
    kept = "\n".join(screen(said))
    assert "5/5" in said
    assert "left" in said
    assert "5/5" not in kept
    assert re.search(r"stage 1 of 2 +collect +done in \d\.\d s, peak memory \d+\.\d\d GB", kept)
    assert re.search(r"stage 2 of 2 +score +done in", kept)


def test_a_terminal_that_is_dumb_gets_plain_lines(tmp_path):
    _, said = in_terminal(fake(tmp_path / "run"), 80, 24, TERM="dumb")
    assert "\x1b" not in said
    assert "done in" in said


def test_a_pipe_gets_two_unbroken_lines_a_stage(tmp_path):
    done = subprocess.run(
        fake(tmp_path / "run"), check=False, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 0
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 4
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", done.stderr)
    quiet = subprocess.run(
        fake(tmp_path / "run", "--quiet"), check=False, capture_output=True, env=environment()
    )
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, b"", b"")


def test_ctrl_c_says_what_is_kept_and_the_command_to_go_on(tmp_path):
    folder = tmp_path / "a folder"
    code, said = in_terminal(fake(folder, "--wait"), 80, 24, send=b"\x03", after=b"5/5", TERM="xterm")
    assert code == 130
    kept = " ".join("\n".join(screen(said)).split())
    assert "interrupted in collect" in kept
    assert f"arisk fake '{folder}' --wait" in kept
    assert not (folder / ".holder.json").exists()


def test_sigterm_ends_like_ctrl_c_with_its_own_code(tmp_path):
    folder = tmp_path / "run"
    child = subprocess.Popen(
        fake(folder, "--wait"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    end = time.monotonic() + 60
    while not (folder / ".holder.json").exists() and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.3)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 143
    assert out == ""
    assert "are kept" in err
    assert "Traceback" not in err
    assert not (folder / ".holder.json").exists()
    again = subprocess.run(fake(folder), check=False, capture_output=True, text=True, env=environment())
    assert again.returncode == 0


def test_a_reader_that_leaves_is_no_error():
    command = f"{sys.executable} -m arisk schema | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command], check=False, capture_output=True, text=True, env=environment()
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_help_and_status_load_no_heavy_library(tmp_path):
    heavy = ("torch", "numpy", "transformers", "plotly", "safetensors", "pandas")
    config = tmp_path / "my.yaml"
    subprocess.run([sys.executable, "-m", "arisk", "init", str(config)], check=True, capture_output=True)
    for name in ("safety.jsonl", "finetune.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "response": "b"}\n')
    for args, more in ((["--help"], ("pydantic", "yaml")), (["status", str(config)], ("rich.console",))):
        code = (
            f"import sys; sys.argv = ['arisk', *{args!r}]\n"
            "from arisk import cli\n"
            "try: cli.main()\n"
            "except SystemExit: pass\n"
            f"print([name for name in {heavy + more!r} if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "verb", ["", "run", "collect", "status", "check", "init", "schema", "demo", "verify", "what-if"]
)
def test_help_fits_80_columns(verb):
    done = subprocess.run(
        [sys.executable, "-m", "arisk", *([verb] if verb else []), "--help"],
        check=True,
        capture_output=True,
        text=True,
        env=environment(COLUMNS="80"),
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "arisk " in done.stdout
    if verb:
        assert "Example" in done.stdout
    else:
        assert "143" in done.stdout


def test_help_names_every_command_in_a_group_and_in_whole_sentences():
    from arisk.cli.app import groups

    done = subprocess.run(
        [sys.executable, "-m", "arisk", "--help"],
        check=True,
        capture_output=True,
        text=True,
        env=environment(COLUMNS="80"),
    )
    assert "..." not in done.stdout.partition("Options:")[2]
    assert "\nMore:" not in done.stdout
    for heading, names in groups().items():
        part = done.stdout.partition(f"\n{heading}:\n")[2].partition("\n\n")[0]
        assert re.findall(r"(?m)^  (\S+)", part) == list(names)


SCRIPT = f"""#!{sys.executable}
import sys
sys.argv[0] = "arisk"
from arisk.cli import main
main()
"""
#: The completion as a shell has it: the script arisk prints, and the function it defines.
COMPLETE = """
eval "$(arisk --show-completion bash 2>/dev/null)"
COMP_WORDS=("$@"); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _arisk_completion arisk
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("arisk sta", "status"),
        ("arisk run --until sub", "subspace"),
        ("arisk run con", "configs/a.yaml configs/b.yml"),
        ("arisk run configs/b", "configs/b.yml"),
        ("arisk what-if ru", "runs/my"),
        ("arisk status a.yaml --run-dir runs/", "runs/my"),
        ("arisk run a.yaml --set training.learning", "training.learning_rate="),
        ("arisk compare runs/m", "runs/my"),
        ("arisk run nothing", ""),
    ],
)
def test_bash_completes_verbs_paths_and_keys(tmp_path, words, expected):
    for name in ("configs/a.yaml", "configs/b.yml", "configs/notes.txt", "runs/my/config.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    scripts = tmp_path / "bin"
    scripts.mkdir()
    (scripts / "arisk").write_text(SCRIPT)
    (scripts / "arisk").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", *words.split()],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(PATH=f"{scripts}:{os.environ['PATH']}", PYTHONPATH=str(ROOT)),
    )
    assert done.stdout.split() == expected.split()


#: Results as the verbs print them, with long texts; `NO_COLOR` and pipes are the caller's.
TEXTS = """
import json, sys
from pathlib import Path
from arisk.engine.run import Outcome
from arisk.forecast.text import outcome_text
from arisk.cost.check import check_text
long = "word " * 60
curve = {"status": "measured", "reason": None, "kind": "forecast", "collapse_step": 31, "horizon": 200,
    "probability": 1.0, "median": [0.0, 0.48], "trusted_until": 200}
verdict = {"level": "high", "sentence": "Safety is forecast to collapse. " + long, "safe_steps": 28,
    "horizon": 200, "basis": "combined", "reasons": [long], "caveats": [long]}
missing = {**curve, "status": "not_measured", "reason": long}
advice = [{"sentence": long, "command": "arisk run x.yaml " + long}] * 2
summary = {"verdict": verdict, "forecasters": {"combined": curve, "rollout": missing}, "identity": long,
    "evidence": long, "advice": advice}
print(outcome_text(Outcome(Path("runs/x"), ("report",), (), Path("runs/x/report.html"), summary), every=True))
cost = {"seconds": 90.0, "memory_gb": 1.5, "disk_gb": 0.03, "work": "96 single-row gradients, " * 8}
facts = {"rows": 400, "duplicates": 12, "tokens_mean": 226.3, "tokens_max": 4096,
    "response_tokens_mean": 12.0, "response_tokens_min": 2, "prompts_truncated": 0, "responses_truncated": 0,
    "rendered rows": ["<user> " + long + "<assistant>«" + long + "end»"] * 2}
print(check_text({"model": {"path": "m"}, "data": {"safety": facts, "verify.safety": facts},
    "warnings": [long], "plan": {"stages": {"collect": cost, "score": cost}, "seconds": 90.0,
    "memory_gb": 1.5, "warnings": []}}))
"""


@pytest.mark.parametrize("columns", [80, 200])
def test_results_fit_the_terminal(columns):
    code, said = in_terminal([sys.executable, "-c", TEXTS], columns, 24)
    assert code == 0
    lines = re.sub("\x1b\\[[0-9;]*m", "", said).replace("\r\n", "\n").splitlines()
    rendered = [line for line in lines if line.startswith("- safety:")]
    # A rendered row is two lines of the terminal, broken by the terminal itself.
    assert all(len(line) < 2 * columns and line.endswith("end»") for line in rendered)
    assert len(rendered) == 2
    assert max(len(line) for line in lines if line not in rendered) < columns
    assert any(line.startswith("verdict: high. Safety is forecast") for line in lines)
    assert "> 99 %" in said
    assert "100" not in said.replace("1000", "")
    assert "\x1b[1;31mverdict: high\x1b[0m. Safety" in said
    assert "\x1b" not in in_terminal([sys.executable, "-c", TEXTS], columns, 24, NO_COLOR="1")[1]


def test_results_in_a_pipe_are_unbroken_and_plain():
    done = subprocess.run(
        [sys.executable, "-c", TEXTS], check=True, capture_output=True, text=True, env=environment()
    )
    assert "\x1b" not in done.stdout
    assert any(len(line) > 300 for line in done.stdout.splitlines() if line.startswith("because: "))


@pytest.mark.parametrize("columns", [80, 200])
def test_status_fits_the_terminal(tmp_path, columns):
    config = tmp_path / "a-config-with-a-rather-long-name.yaml"
    model = str(ROOT / "fixtures" / "tiny-aligned")
    made = [sys.executable, "-m", "arisk", "init", str(config), "--model", model]
    subprocess.run(made, check=True, capture_output=True)
    for name in ("safety.jsonl", "finetune.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a", "response": "b"}\n')
    code, said = in_terminal([sys.executable, "-m", "arisk", "status", str(config)], columns, 24)
    assert code == 0
    lines = said.replace("\r\n", "\n").splitlines()
    stages = {"collect", "subspace", "score", "rollout", "forecast", "report", "verify", "screen", "guard"}
    assert stages <= {line.split()[0] for line in lines if line.split()}
    # Commands to copy stay in one piece.
    assert max(len(line) for line in lines if "arisk " not in line) < columns
