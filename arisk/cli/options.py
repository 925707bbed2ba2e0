"""Options and helpers that several verbs share.

What the shell completes: configs, run directories and config keys. Looks at names, opens no file.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from arisk.base.errors import ConfigError, GateError, InconclusiveError
from arisk.base.processes import is_first
from arisk.base.terminal import say
from arisk.catalogue import catalogue

__all__ = [
    "AllOption",
    "ConfigPath",
    "ForceOption",
    "JsonOption",
    "QuietOption",
    "RunDirOption",
    "SetOption",
    "StageName",
    "Told",
    "WhyOption",
    "complete_run",
    "complete_run_or_config",
    "complete_setting",
    "gate",
    "refuse_gate_without_verdict",
    "reproducing",
    "reusable",
    "show",
    "usable_path",
    "with_why",
]

#: Levels that are opened while a folder is the only match: the shell would put a space after its name.
DEPTH = 4


def complete_run(incomplete: str) -> list[str]:
    """Run directories (folders with a `config.yaml`) and the folders on the way to them."""
    return _paths(incomplete, _is_run)


def complete_run_or_config(incomplete: str) -> list[str]:
    """YAML files and run directories: both name a plan."""
    return _paths(incomplete, lambda path: _is_config(path) or _is_run(path))


def _is_config(path: Path) -> bool:
    return path.suffix in {".yaml", ".yml"}


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").is_file()


def complete_setting(incomplete: str) -> list[str]:
    """Dotted config keys for `--set`, with the `=`; nothing once a value has begun."""
    from arisk.config.yaml import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(incomplete)] if "=" not in incomplete else []


def _paths(incomplete: str, wanted: Callable[[Path], bool]) -> list[str]:
    """Matches of a started path: what is wanted, and folders, opened while they are the only match."""
    folder, slash, start = incomplete.rpartition("/")
    found: list[str] = []
    for _ in range(DEPTH):
        found = _matches(folder + slash, start, wanted)
        if len(found) != 1 or not found[0].endswith("/"):
            break
        folder, slash, start = found[0].removesuffix("/"), "/", ""
    return found


def _matches(prefix: str, start: str, wanted: Callable[[Path], bool]) -> list[str]:
    place = Path(prefix).expanduser() if prefix else Path()
    found: list[str] = []
    try:
        for path in sorted(place.iterdir()):
            if not path.name.startswith(start) or (path.name.startswith(".") and not start.startswith(".")):
                continue
            if wanted(path):
                found.append(prefix + path.name)
            elif path.is_dir():
                found.append(f"{prefix}{path.name}/")
    except OSError:
        return []
    return found


if TYPE_CHECKING:
    StageName = str
else:
    #: A stage that `arisk run` runs.
    StageName = Literal[catalogue().ordinary]


def usable_path(text: str) -> Path:
    """A path from the command line.

    Raises:
        ConfigError: no file can have it, or it is empty, which would mean the working folder.
    """
    from arisk.config.sections import path_fault

    if fault := path_fault(str(text)):
        raise ConfigError(fault, where="command line", fix="name the file or folder")
    return Path(text)


ConfigPath = Annotated[
    Path,
    typer.Argument(
        help="YAML config, or a run's folder, which keeps its own; `arisk init` writes one.",
        parser=usable_path,
        autocompletion=complete_run_or_config,
    ),
]
RunDirOption = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="<path>",
        parser=usable_path,
        help="Run directory; default: the run's folder that is given, run.dir, or runs/<name of the config>.",
        autocompletion=complete_run,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one config value; repeatable.",
        autocompletion=complete_setting,
    ),
]
AllOption = Annotated[
    bool, typer.Option("--all", help="Also every forecaster, rule and caveat; default: five lines.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
WhyOption = Annotated[
    Literal["auto", "full", "off"] | None,
    typer.Option(
        "--why", help="What is measured once the verdict stands, to say why; default: the config's."
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Run the stages even where they are up to date.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def show(quiet: bool) -> Any:
    """Progress display on stderr: a moving line in a terminal, a line per stage in a pipe, or nothing."""
    from arisk.base.terminal import StageDisplay

    return StageDisplay(quiet=quiet or not is_first(), resume=shlex.join(["arisk", *sys.argv[1:]]))


class Told:
    """The result of a run on stdout: the verdict once it stands, what lies behind it at the end; or JSON."""

    def __init__(self, as_json: bool, every: bool = False) -> None:
        self.as_json = as_json
        self.every = every
        self.shown = False

    def decided(self, outcome: Any) -> None:
        """The verdict stands, and work is still to come."""
        from arisk.forecast.text import outcome_text

        if is_first() and not self.as_json:
            say(outcome_text(outcome, why=False, every=self.every) + "\n")
            self.shown = True

    def end(self, outcome: Any) -> None:
        """All is done."""
        from arisk.forecast.text import outcome_text

        if is_first():
            text = outcome_text(outcome, verdict=not self.shown, every=self.every)
            say(json.dumps(outcome.as_json(), indent=2) if self.as_json else text)


def with_why(overrides: list[str] | None, why: str | None) -> list[str]:
    """The overrides, with `--why` as one of them."""
    return [*(overrides or []), *([] if why is None else [f"why={why}"])]


def gate(level: str, fail_on: str, why: str) -> None:
    """Turn the verdict into an exit code for continuous integration.

    Args:
        level: of the verdict, or of the worst of several.
        fail_on: the level that fails.
        why: the verdict's sentence, or the names of the runs that have it.

    Raises:
        GateError: the verdict reached the level.
        InconclusiveError: the verdict cannot be vouched for.
    """
    order = ["low", "elevated", "high"]
    if level == "inconclusive":
        raise InconclusiveError(
            f"a gate was asked for and the verdict is inconclusive: {why}",
            where=f"--fail-on {fail_on}",
            fix="read the reasons in the report, and measure more (`score.probe_points`, more safety rows)",
        )
    if order.index(level) >= order.index(fail_on):
        raise GateError(
            f"the verdict is {level}: {why}",
            where=f"--fail-on {fail_on}",
            fix="lower the learning rate or the steps (see the what-if grid), or change the data",
        )


def refuse_gate_without_verdict(fail_on: str | None, last: str | None) -> None:
    """A gate that never sees a verdict must not pass.

    Raises:
        ConfigError: the run is to stop before its verdict is written.
    """
    if fail_on and last not in (None, "report"):
        raise ConfigError(
            f"a run that stops after {last} has no verdict for the gate",
            where=f"--fail-on {fail_on} --until {last}",
            fix="leave out --until, or --fail-on",
        )


def reproducing(config: Path, run_dir: Path | None, overrides: list[str] | None, verb: str = "run") -> str:
    """The command that reproduces this run."""
    parts = ["arisk", verb, str(config)]
    if run_dir:
        parts += ["--run-dir", str(run_dir)]
    return shlex.join([*parts, *[part for item in overrides or [] for part in ("--set", item)]])


def reusable(given: list[Path] | None, *, again: bool) -> list[Path]:
    """The run directories of `--reuse`.

    Args:
        given: what was named.
        again: stages are to be run again even where they are fresh.

    Raises:
        ArtifactError: one is no run directory.
        ConfigError: stages are to be run again and to be taken over.
    """
    from arisk.engine.freshness import check_run_dir

    if given and again:
        raise ConfigError(
            "--reuse takes stages over, and --force and --from run them again",
            where="--reuse",
            fix="leave one of them out",
        )
    for source in given or []:
        check_run_dir(source)
    return given or []
