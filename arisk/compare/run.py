"""Runs what is missing, reads every run, ranks them, and writes the page, JSON and Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arisk.anatomy.stage import COLLECT
from arisk.base.artifacts import FORMAT_VERSION, finite
from arisk.base.errors import ConfigError
from arisk.base.processes import is_first
from arisk.compare.page import Comparative, render_comparison
from arisk.compare.reading import (
    FinishedRun,
    NamedPlan,
    differing_settings,
    distinct_names,
    finished,
    notes,
    plans_of,
    refuse_different_safety,
    same_plans,
)
from arisk.compare.record import Ranked
from arisk.compare.text import compare_json, compare_markdown
from arisk.engine.fingerprints import DigestCache, input_fingerprints
from arisk.engine.freshness import ingredients_of
from arisk.engine.job import Display
from arisk.engine.run import Outcome, run_stages
from arisk.engine.rundir import RunDir
from arisk.engine.stage import Catalogue

__all__ = ["Compared", "compare_plans"]

PAGE, DATA, MARKDOWN = "compare.html", "compare.json", "compare.md"


@dataclass(frozen=True)
class Compared:
    """What a comparison found.

    Attributes:
        told: everything that is shown.
        page: the HTML page; compare.json and compare.md lie beside it.
        done: what was run for each config, by run directory.
        body: `compare.json` as plain values.
    """

    told: Comparative
    page: Path
    done: Mapping[str, Outcome]
    body: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        """Plain values for `--json`: `compare.json`, where the page is, and what was run."""
        work = {
            name: {"ran": list(made.ran), "fresh": list(made.fresh), "taken": dict(made.taken)}
            for name, made in self.done.items()
        }
        return {**self.body, "page": str(self.page), "work": work}


def compare_plans(
    catalogue: Catalogue,
    given: Sequence[Path],
    *,
    output: Path,
    show: Display,
    command: str,
    overrides: Sequence[str] = (),
    base: Path | None = None,
    last: str = "report",
    force: bool = False,
    title: str | None = None,
) -> Compared:
    """Compare planned fine-tunes of one model.

    Args:
        catalogue: the stages.
        given: run directories and YAML configs, two or more, each once.
        output: folder of the page, `compare.json` and `compare.md`.
        show: told what happens.
        command: the command that does this, for the page and the locks.
        overrides: `--set` overrides of every config.
        base: configs run in `base/<name of the config>`; default as `arisk run` does.
        last: last stage run for configs: "forecast" or "report".
        force: run the stages of configs even where they are fresh.
        title: heading; default made from the number of plans.

    Raises:
        AriskError: what went wrong; stages finished before are committed.
    """
    plans = plans_of(given, overrides, base)
    _refuse_run_as_output(output)
    with RunDir(output).lock(command) if is_first() else nullcontext():
        cache = DigestCache(output / ".digests.json")
        done = _run_configs(catalogue, plans, cache, show, command, last, force)
        runs = [finished(catalogue, plan.run_dir) for plan in plans]
        told = _compared(runs, title, command)
        body = {"format_version": FORMAT_VERSION, **finite(compare_json(told))}
        if is_first():
            target = RunDir(output)
            target.write(PAGE, render_comparison(told, output))
            target.write(MARKDOWN, compare_markdown(told))
            target.write(DATA, json.dumps(body, indent=1, allow_nan=False) + "\n")
    return Compared(told, output / PAGE, done, body)


def _run_configs(
    catalogue: Catalogue,
    plans: Sequence[NamedPlan],
    cache: DigestCache,
    show: Display,
    command: str,
    last: str,
    force: bool,
) -> dict[str, Outcome]:
    """Bring every config up to date, each taking from the others what it has in common with them."""
    _refuse_before_work(catalogue, plans, cache)
    done: dict[str, Outcome] = {}
    models: dict[str, Any] = {}
    folders = [plan.run_dir for plan in plans]
    for place, plan in enumerate(plans, 1):
        if plan.config is None:
            continue
        show.note(f"plan {place} of {len(plans)}: {plan.given} in {plan.run_dir}")
        # What is forced is run once: only runs made here may be taken from then.
        reuse = [Path(name) for name in done] if force else folders
        done[str(plan.run_dir)] = run_stages(
            catalogue,
            plan.config,
            run_dir=plan.run_dir,
            show=show,
            command=command,
            last=last,
            force=force,
            reuse=reuse,
            models=models,
        )
    return done


def _refuse_before_work(catalogue: Catalogue, plans: Sequence[NamedPlan], cache: DigestCache) -> None:
    """Refuse plans that cannot stand in one table before minutes are spent on them.

    Raises:
        AriskError: a run is not finished, or models or safety rows differ.
    """
    names = distinct_names([plan.run_dir for plan in plans])
    sides: dict[str, Mapping[str, Any]] = {}
    for name, plan in zip(names, plans, strict=True):
        if plan.config is None:
            sides[name] = finished(catalogue, plan.run_dir).safety
        else:
            sides[name] = ingredients_of(COLLECT, plan.config, input_fingerprints(plan.config, cache), {})
    if is_first():
        cache.save()
    refuse_different_safety(sides)


def _compared(runs: Sequence[FinishedRun], title: str | None, command: str) -> Comparative:
    """Everything that is shown about the runs."""
    names = distinct_names([run.run_dir for run in runs])
    said = refuse_different_safety({name: run.safety for name, run in zip(names, runs, strict=True)})
    said += same_plans({name: run.states["forecast"].key for name, run in zip(names, runs, strict=True)})
    planned = [run.planned(name) for name, run in zip(names, runs, strict=True)]
    ranked = Ranked.all(planned)
    configs = {name: run.config for name, run in zip(names, runs, strict=True)}
    ordered = [entry.run.name for entry in ranked]
    inputs = {name: run.inputs for name, run in zip(names, runs, strict=True)}
    settings = differing_settings(
        {name: configs[name] for name in ordered}, [inputs[name] for name in ordered]
    )
    return Comparative(
        title=title or f"{len(runs)} planned fine-tunes of {_common([run.trains for run in planned])}",
        ranked=ranked,
        settings=settings,
        notes=[*said, *notes([entry.run for entry in ranked], settings)],
        command=command,
    )


def _common(trains: Sequence[str]) -> str:
    """What all runs train, or the model that they share; "one model" where nobody knows its name.

    >>> _common(["m + LoRA r = 8", "m + LoRA r = 8"]), _common(["m + LoRA r = 8", "m (all weights)"])
    ('m + LoRA r = 8', 'm')
    """
    if len(set(trains)) == 1:
        return trains[0] or "one model"
    models = {re.split(r" [+(]", text)[0] for text in trains}
    return models.pop() if len(models) == 1 and "" not in models else "one model"


def _refuse_run_as_output(output: Path) -> None:
    """A comparison is not written into a run directory.

    Raises:
        ConfigError: the folder holds a run.
    """
    if (output / "config.yaml").exists():
        raise ConfigError(
            "this folder holds a run",
            where=f"--output {output}",
            fix="choose another folder for the comparison",
        )
