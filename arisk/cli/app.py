"""The Typer application, its options before the verb, and the way from errors to exit codes.

The list of commands in `arisk --help`, in groups and in whole sentences.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from arisk.base.artifacts import disk_error
from arisk.base.errors import AriskError, ArtifactError, ConfigError
from arisk.base.processes import is_first
from arisk.base.terminal import say
from arisk.catalogue import catalogue

__all__ = ["Grouped", "app", "groups", "main"]


def groups() -> dict[str, tuple[str, ...]]:
    """Headings with their commands, in the order a newcomer meets them."""
    return {
        "Forecast a plan": ("run", "check", "status", "what-if", "compare", "card"),
        "Act on the risk": catalogue().optional,
        "Set up": ("demo", "init", "schema"),
        "Stages one by one": catalogue().ordinary,
    }


#: The formatter's unit for a text that is wrapped and never cut.
WHOLE = 10_000


class Grouped(TyperGroup):
    """Commands under headings; one that no group names comes last, so that none is hidden."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands in the order of `groups`."""
        named = [name for names in groups().values() for name in names]
        known = super().list_commands(ctx)
        return [name for name in named if name in known] + [name for name in known if name not in named]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every group as a section of its own."""
        left = self.list_commands(ctx)
        widest = max(map(len, left))
        for heading, names in (*groups().items(), ("More", tuple(left))):
            rows: list[tuple[str, str]] = []
            for name in names:
                command = self.get_command(ctx, name) if name in left else None
                if command is not None and not command.hidden:
                    rows.append((name.ljust(widest), command.get_short_help_str(WHOLE)))
                    left.remove(name)
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)


class Plain(TyperCommand):
    """A command whose usage names its arguments as they are: `arisk run [OPTIONS] config`."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Without the braces that some versions of typer write."""
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]


class _App(typer.Typer):
    def command(self, *given: Any, **settings: Any) -> Any:
        """Register a command, plain by default."""
        return super().command(*given, **{"cls": Plain, **settings})


#: Exit codes of a run that Ctrl-C or SIGTERM ended: 128 + 2, 128 + 15.
INTERRUPTED, TERMINATED = 130, 143

app = _App(
    name="arisk",
    cls=Grouped,
    help="Will this fine-tune break the model's safety, when, and because of which data and layers?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: arisk init my.yaml, edit it, arisk check my.yaml, arisk run my.yaml. "
    "Exit codes: 0 ok, 2 config, 3 input, 4 artifact, 5 shape, 6 numerics, 7 missing extra, "
    "10 gate failed, 11 inconclusive gate, 130 interrupted (Ctrl-C), 143 terminated.",
)


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        say(version("arisk"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command."""
    del version
    if debug:
        os.environ["ARISK_DEBUG"] = "1"


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ends a run as Ctrl-C does."""

    seen = False


def _terminated(number: int, frame: object) -> None:
    del number, frame
    _Terminated.seen = True
    raise _Terminated


def _who() -> str:
    return "" if is_first() else f"process {os.environ.get('RANK')}: "


def _bug(err: Exception) -> str:
    """One line that says it is ours and where the traceback is; with --debug the traceback itself."""
    told = traceback.format_exc()
    command = shlex.join(["arisk", *sys.argv[1:]])
    place = "with --debug it is printed"
    try:
        handle, name = tempfile.mkstemp(prefix="arisk-bug-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{command}\n\n{told}")
        place = f"it is in {name}"
    except OSError:
        pass
    first = (str(err).strip().splitlines() or [""])[0][:200]
    line = (
        f"error: this is a bug of arisk, not your fault: {type(err).__name__}: {first}; the full traceback "
        f"helps to mend it, {place}; please report it with the command: {command}"
    )
    return f"{told}\n{line}" if os.environ.get("ARISK_DEBUG") else line


def _refused(err: OSError) -> ArtifactError:
    """What the system's answer about some file means to a person."""
    where = str(err.filename or "a file of this run")
    if err.errno in (errno.ENOSPC, errno.EROFS):
        return disk_error(err, Path(where))
    return ArtifactError(
        f"the system refuses: {err.strerror or err}",
        where=where,
        fix="see whether it is there, and may be read and written by you",
    )


def _misused(err: Exception) -> str | None:
    """What is told of a command line that means nothing; None for any other exception."""
    from arisk.config.yaml import shortened

    told = getattr(err, "format_message", None)
    if told is None:
        return None
    if len(sys.argv) == 1:
        return told()  # `arisk` alone: the help
    verb = getattr(getattr(err, "ctx", None), "command_path", "arisk")
    fault = ConfigError(shortened(told(), 600), where="command line", fix=f"see `{verb} --help`")
    return "\n".join(fault.lines())


def _quiet_others() -> None:
    """Nothing but our own lines on stderr: what others warn of is for their developers, and in --debug."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if os.environ.get("ARISK_DEBUG"):
        return
    logging.disable()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


#: What a shell puts into `_ARISK_COMPLETE` to ask for completions, or for the script that asks.
COMPLETION = re.compile("(source|complete)_(bash|zsh|fish|powershell|pwsh)")


def _completing() -> None:
    """Leave completion to who asks for it: with anything else in the variable the command is meant."""
    asked = COMPLETION.fullmatch(os.environ.get("_ARISK_COMPLETE", ""))
    typed = "COMP_WORDS" in os.environ and os.environ.get("COMP_CWORD", "").isdecimal()
    if asked is None or (asked.group() == "complete_bash" and not typed):
        os.environ.pop("_ARISK_COMPLETE", None)


def main() -> None:
    """Entry point of the `arisk` command: errors become three lines on stderr and an exit code."""
    # Threads that wait by spinning make a shared machine many times slower; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _Terminated.seen = False
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        from arisk.cli.stages import add_stage_verbs

        add_stage_verbs()
        _quiet_others()
        _completing()
        code = app(standalone_mode=False, prog_name="arisk")
        if code:  # Typer makes 130 of every interruption.
            sys.exit(TERMINATED if _Terminated.seen else code)
    except KeyboardInterrupt:  # Before or after Typer's part.
        sys.exit(TERMINATED if _Terminated.seen else INTERRUPTED)
    except AriskError as err:
        if os.environ.get("ARISK_DEBUG"):
            say(traceback.format_exc(), err=True)
        say(_who() + "\n".join(err.lines()), err=True)
        sys.exit(err.exit_code)
    except OSError as err:
        # The system's answer about some file: of the environment, and no bug.
        if os.environ.get("ARISK_DEBUG"):
            say(traceback.format_exc(), err=True)
        fault = _refused(err)
        say(_who() + "\n".join(fault.lines()), err=True)
        sys.exit(fault.exit_code)
    except Exception as err:  # noqa: BLE001 - the net: whatever else comes up here is a bug of ours
        misused = _misused(err)
        say(misused or _who() + _bug(err), err=True)
        sys.exit(1 if misused is None else ConfigError.exit_code)
    finally:
        logging.disable(logging.NOTSET)
        signal.signal(signal.SIGTERM, before)
