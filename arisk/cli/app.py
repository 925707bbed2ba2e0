"""The Typer application, its options before the verb, and the way from errors to exit codes."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from arisk.base.errors import AriskError
from arisk.base.processes import is_first
from arisk.cli.grouped import Grouped

__all__ = ["app", "main"]

#: Exit code of a run that SIGTERM ended: 128 + 15.
TERMINATED = 143

app = typer.Typer(
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

        typer.echo(version("arisk"))
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


def main() -> None:
    """Entry point of the `arisk` command: errors become three lines on stderr and an exit code."""
    # Threads that wait by spinning make a shared machine many times slower; read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _Terminated.seen = False
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except AriskError as err:
        if os.environ.get("ARISK_DEBUG"):
            raise
        who = "" if is_first() else f"process {os.environ.get('RANK')}: "
        typer.echo(who + "\n".join(err.lines()), err=True)
        sys.exit(err.exit_code)
    except SystemExit:
        if _Terminated.seen:  # Typer makes 130 of every interruption.
            sys.exit(TERMINATED)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
