"""What was named on the command line: run directories and configs, each one plan with a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arisk.base.errors import AriskError, ConfigError
from arisk.config.plan import Config
from arisk.config.yaml import load_config, run_directory
from arisk.engine.reuse import check_run_dir

__all__ = ["Plan", "plans_of"]


@dataclass(frozen=True)
class Plan:
    """One planned fine-tune: `config` is None where a finished run was named."""

    given: Path
    run_dir: Path
    config: Config | None


def plans_of(given: Sequence[Path], overrides: Sequence[str], base: Path | None) -> list[Plan]:
    """The plans, every mistake in them at once.

    Args:
        given: run directories and YAML configs.
        overrides: `key=value` for every config.
        base: configs run in `base/<name of the config>`; None: as `arisk run` does.

    Raises:
        AriskError: one is neither, a config is wrong, there are fewer than two, or two are one run.
    """
    plans: list[Plan] = []
    wrong: list[AriskError] = []
    for path in given:
        try:
            plans.append(_plan(path, overrides, base))
        except AriskError as err:
            wrong.append(err)
    if wrong:
        first, *others = wrong
        raise type(first)(first.what, where=first.where, fix=first.fix, also=[*first.also, *others])
    if len(plans) < 2:
        raise ConfigError(
            "a comparison needs two plans or more",
            where=" ".join(map(str, given)) or "arisk compare",
            fix="name further run directories or configs; one run alone has its own report",
        )
    _distinct(plans)
    return plans


def _plan(path: Path, overrides: Sequence[str], base: Path | None) -> Plan:
    if path.is_file():
        config = load_config(path, overrides)
        return Plan(path, base / path.stem if base else run_directory(config, path, None), config)
    check_run_dir(path)
    return Plan(path, path, None)


def _distinct(plans: Sequence[Plan]) -> None:
    """Refuse two plans in one run directory.

    Raises:
        ConfigError: names both.
    """
    seen: dict[Path, Plan] = {}
    for plan in plans:
        other = seen.setdefault(plan.run_dir.resolve(), plan)
        if other is plan:
            continue
        if other.given == plan.given:
            what, fix = f"{plan.given} is given twice", "name each plan once"
        else:
            what = f"{other.given} and {plan.given} are one run: {plan.run_dir}"
            fix = "give configs names of their own, or `run.dir`, or leave one out"
        raise ConfigError(what, where="arisk compare", fix=fix)
