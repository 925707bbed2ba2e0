"""What data may do to a terminal, and what is said where nobody thought of it."""

import ast
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from arisk import cli
from arisk.base.errors import ConfigError
from arisk.base.terminal import StageDisplay, natives_silenced, printable, say

ROOT = Path(__file__).parent.parent.parent
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
HOSTILE = "a\x1b]52;c;aGk=\x07 b\x1b]0;title\x07 \x9b2J \x90 c\x08\r\u202egpj.\ud800 \x7f d"


def test_every_command_is_written_out_and_nothing_else_changed():
    shown = printable(HOSTILE)
    assert not OBEYED.search(shown)
    assert shown.startswith("a\\x1b]52;c;aGk=\\x07 b")
    assert "\\u202e" in shown
    assert "\\ud800" in shown
    shown.encode()
    assert printable("plain – ünï 日本\n\ttext") == "plain – ünï 日本\n\ttext"


def test_only_our_own_colours_stay():
    ours = "\x1b[1;31mrisk: high\x1b[0m"
    assert printable(ours) == ours
    for other in ("\x1b[8m", "\x1b[2J", "\x1b[1;31;8m", "\x1b[6n"):
        assert "\x1b" not in printable(other)


@pytest.mark.parametrize("name", ["start", "note", "skip", "finish"])
def test_progress_shows_nothing_that_is_obeyed(name, capsys):
    display = StageDisplay(resume=HOSTILE)
    display.planned([HOSTILE])
    getattr(display, name)(*([HOSTILE, HOSTILE] if name == "start" else [HOSTILE]))
    display.interrupted()
    assert not OBEYED.search(capsys.readouterr().err)


def test_no_other_way_leads_to_a_terminal():
    found = []
    for file in sorted((ROOT / "arisk").rglob("*.py")):
        if file == ROOT / "arisk" / "base" / "terminal.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "print" or called.endswith((".echo", ".secho", "stdout.write", "stderr.write")):
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno} {called}")
    assert found == []


def arisk(*args, **streams):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(streams.pop("tmp", "/tmp"))}
    return subprocess.run(
        [sys.executable, "-m", "arisk", *map(str, args)], check=False, env=environment, **streams
    )


def test_a_config_path_reaches_the_terminal_written_out(tmp_path):
    done = arisk("check", str(tmp_path / "x\x1b]0;t\x07.yaml"), capture_output=True, text=True)
    assert done.returncode == 2
    assert not OBEYED.search(done.stderr)


@pytest.mark.parametrize(
    "args",
    [["run"], ["run", "x", "--fail-on", "\x1b]0;t\x07"], ["\x1b[2J"], ["check", "a", "b"], ["run", "--x"]],
)
def test_a_command_line_that_means_nothing_is_an_error_like_others(monkeypatch, capsys, args):
    monkeypatch.setattr(sys, "argv", ["arisk", *args])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert re.match(r"error: .*\nwhere: command line\nfix:   see `arisk( run| check)? --help`\n$", told)
    assert not OBEYED.search(told)


@pytest.mark.parametrize(
    "value", ["", "x", "complete_x", "source_", "complete_bash", "{}", "complete_bash\n"]
)
def test_what_no_shell_asks_is_no_completion(monkeypatch, capsys, value):
    monkeypatch.setenv("_ARISK_COMPLETE", value)
    monkeypatch.delenv("COMP_WORDS", raising=False)
    monkeypatch.setattr(sys, "argv", ["arisk", "--version"])
    cli.main()
    assert re.fullmatch(r"\d+\.\d+\S*\n", capsys.readouterr().out)


def test_a_shell_that_asks_is_answered(monkeypatch, capsys):
    monkeypatch.setenv("_ARISK_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "arisk ru")
    monkeypatch.setenv("COMP_CWORD", "1")
    monkeypatch.setattr(sys, "argv", ["arisk"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert "run" in capsys.readouterr().out.split()


def test_other_libraries_say_nothing_before_us(monkeypatch, capsys):
    def noisy(*_, **__):
        logging.getLogger("datasets.packaged").critical("Failed to read schema")
        warnings.warn("there is a performance drop", stacklevel=1)
        raise ConfigError("ours", where="x", fix="y")

    monkeypatch.setattr(sys, "warnoptions", [])
    monkeypatch.setattr(sys.modules["arisk.cli.app"], "app", noisy)
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == "error: ours\nwhere: x\nfix:   y\n"
    assert logging.getLogger("datasets").isEnabledFor(logging.ERROR)


def test_no_error_repeats_what_it_was_given_without_end():
    error = ConfigError(
        "x" * 20_000, where="y" * 20_000, fix="z", also=[ConfigError("a", where="b", fix="c")]
    )
    lines = error.lines()
    assert max(map(len, lines)) < 2000
    assert "(20000 characters)" in lines[0]
    assert lines[2:] == ["fix:   z", "error: a", "where: b", "fix:   c"]


def test_whatever_else_comes_up_is_called_a_bug_with_its_traceback_in_a_file(monkeypatch, capsys, tmp_path):
    def broken(*_, **__):
        raise LookupError("nobody thought\nof this \x1b]0;t\x07")

    monkeypatch.setattr(sys, "argv", ["arisk", "run", "my plan.yaml"])
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(sys.modules["arisk.cli.app"], "app", broken)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "this is a bug of arisk" in lines[0]
    assert "LookupError: nobody thought;" in lines[0]
    assert lines[0].endswith("arisk run 'my plan.yaml'")
    (file,) = tmp_path.glob("arisk-bug-*.txt")
    assert str(file) in lines[0]
    assert "Traceback (most recent call last)" in file.read_text()
    assert "of this" in file.read_text()
    monkeypatch.setenv("ARISK_DEBUG", "1")
    with pytest.raises(SystemExit):
        cli.main()
    assert "Traceback" in capsys.readouterr().err


def test_the_systems_answer_is_no_bug(monkeypatch, capsys):
    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", "/some/file")

    monkeypatch.setattr(sys.modules["arisk.cli.app"], "app", refused)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 4
    told = capsys.readouterr().err
    assert told.startswith("error: the system refuses: Permission denied\nwhere: /some/file\n")


def test_a_reader_that_goes_away_fails_nothing():
    done = subprocess.run(
        f"set -o pipefail; {sys.executable} -m arisk schema | head -c 10",
        shell=True,
        executable="/bin/bash",
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a Linux device")
def test_a_full_output_is_an_error_of_its_own():
    with Path("/dev/full").open("w") as full:
        done = arisk("schema", stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4
    assert "the output cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_closed_output_fails_nothing():
    done = subprocess.run(
        f"{sys.executable} -m arisk schema >&-",
        shell=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0


def test_text_beyond_the_encoding_of_the_terminal_is_written_out(capsysbinary):
    say("½ 日本 \ud800")
    assert b"\\ud800" in capsysbinary.readouterr().out


def test_what_compiled_code_prints_reaches_no_terminal(capfd, monkeypatch):
    """The tokenizers' library prints the unknown keys of an added token, whatever they hold."""
    monkeypatch.delenv("ARISK_DEBUG", raising=False)
    sys.stdout.write("before\n")
    with natives_silenced():
        os.write(1, b"unknown key \x1b[2J\n")
        os.write(2, b"\x1b]0;title\x07\n")
    os.write(1, b"after\n")
    assert capfd.readouterr() == ("before\nafter\n", "")
