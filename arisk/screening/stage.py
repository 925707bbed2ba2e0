"""Stage screen: how it runs on a job, what its verb prints, and its files: kept and flagged rows as JSONL.

Every field of the source is preserved.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base.artifacts import disk_error, read_record, write_tensors
from arisk.base.errors import ConfigError, InputError
from arisk.base.processes import barrier, from_first
from arisk.engine.freshness import stage_key
from arisk.engine.job import Job
from arisk.engine.stage import Stage, StageOption, where_hidden

if TYPE_CHECKING:
    from arisk.config.plan import Config, DataConfig
    from arisk.forecast.record import RolloutResult
    from arisk.report.page import Section
    from arisk.screening.record import ScreenResult

__all__ = ["FLAGGED_FILE", "KEPT_FILE", "SCREEN", "SplitRow", "split_rows"]

KEPT_FILE, FLAGGED_FILE = "kept.jsonl", "flagged.jsonl"

#: What is added to a row: its score, its rank from 1 and why it is flagged (empty where it is not).
SplitRow = Mapping[str, Any]


def split_rows(
    data: DataConfig | tuple[DataConfig, ...],
    places: Sequence[tuple[str, int]],
    added: Sequence[SplitRow],
    flagged: frozenset[int],
    folder: Path,
    *,
    show_text: bool = True,
) -> tuple[int, int]:
    """Write every screened row once: to `kept.jsonl` or to `flagged.jsonl`, in the order of the source.

    Each object is that of the source with the added keys; values keep their types, text stays
    readable. Rows that `max_samples` left out are in neither file. Where texts may not be shown, the
    place of a row in its source (`arisk_source`, `arisk_line`) stands for it.

    Args:
        data: the data set, or its parts.
        places: (N,) path and line of every screened row.
        added: (N,) keys to add to every row.
        flagged: numbers of the flagged rows.
        folder: where the files go.
        show_text: write the rows themselves.

    Returns:
        Rows kept, rows flagged.

    Raises:
        InputError: the source no longer has a screened row.
        ArtifactError: the disk is full or the folder is read-only.
    """
    from arisk.config.plan import parts_of
    from arisk.models.files import raw_rows

    numbers: dict[tuple[str, int], list[int]] = {}
    for j, place in enumerate(places):
        numbers.setdefault(place, []).append(j)
    counts = [0, 0]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with (
            (folder / KEPT_FILE).open("w", encoding="utf-8", newline="\n") as kept,
            (folder / FLAGGED_FILE).open("w", encoding="utf-8", newline="\n") as dropped,
        ):
            for config in parts_of(data):
                for line, raw in raw_rows(config, "finetune"):
                    row = raw if show_text else {"arisk_source": config.path, "arisk_line": line}
                    for j in numbers.pop((config.path, line), ()):
                        drop = j in flagged
                        counts[drop] += 1
                        (dropped if drop else kept).write(_line({**row, **added[j]}))
    except OSError as err:
        raise disk_error(err, folder) from err
    if numbers:
        path, line = min(numbers)
        raise InputError(
            f"{len(numbers)} screened rows are no longer in the data",
            where=f"finetune.path: {path}, line {line}",
            fix="the file changed while it was screened: run the same command again",
        )
    return counts[0], counts[1]


def _line(row: Mapping[str, Any]) -> str:
    """One JSON line; text that is no valid Unicode is escaped."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(row, default=str)
    return text + "\n"


#: Numbers by row that `scores.safetensors` holds.
SCORES = (
    *("scores", "first_order", "control_order"),
    *("losses", "gradient_norms", "p_values", "exact", "lengths"),
)
#: Settings that decide which prompts count as refused.
JUDGED = ("behaviour.judge", "behaviour.refusal_openings")
#: Further settings of the refusals that the what-if counts.
SAID = ("behaviour.prompts", "behaviour.tokens", "behaviour.opening_tokens")
#: Settings of the band that it draws around them.
BAND = ("forecast.confidence", "forecast.bootstrap_samples")
#: Settings of screen that only say which of its scores are flagged, and what is shown of that.
FLAGGING = ("drop", "false_discovery", "what_if")


def _screen(job: Job, workspace: Path) -> ScreenResult:
    """Score the fine-tuning rows, or flag stored scores anew; write kept and flagged rows."""
    from arisk.forecast.run import as_walked
    from arisk.screening.flags import flagged_anew
    from arisk.screening.run import screen
    from arisk.screening.what_if import dropping

    config, task = job.config, job.task
    steps = job.planned_steps()
    show_text = config.report.show_text
    old = from_first(lambda: _screened_before(job))
    made = flagged_anew(old, config.screen) if old is not None else None
    if made is None or old is None or not _flags_stand(made, old):
        made = screen(
            task,
            config=config.screen,
            training=config.training,
            steps=steps,
            seed=config.run.seed,
            behaviour=config.behaviour,
            workspace=workspace,
            progress=job.show.progress,
        )
        made = made if show_text else replace(made, examples=[_hidden(row) for row in made.examples])
    what_if: Mapping[str, Any] = {"status": "not_measured", "reason": "screen.what_if is off"}
    if config.screen.what_if:
        what_if = dropping(
            task,
            made.flagged,
            config=as_walked(task, config),
            training=config.training,
            steps=steps,
            seed=config.run.seed,
            behaviour=config.behaviour,
            forecast=config.forecast,
            before=_rolled_out(job),
            workspace=workspace,
            progress=job.show.progress,
        )

    def written() -> dict[str, Any]:
        for name in ("before", "after"):
            shutil.rmtree(workspace / name, ignore_errors=True)
        scores = {name: value for name in SCORES if (value := getattr(made, name)) is not None}
        write_tensors(workspace / "scores.safetensors", scores)
        return _split(job, made, workspace)

    barrier()  # No process may still read a rollout's state.
    return replace(made, what_if=what_if, **from_first(written))


def _hidden(row: Mapping[str, Any]) -> dict[str, Any]:
    """An explained row without its text, and without those of the safety samples that it hurts."""
    hurts = row.get("hurts")
    return {
        **{key: value for key, value in row.items() if key not in {"prompt", "response"}},
        "hurts": None if hurts is None else [{**sample, "prompt": ""} for sample in hurts],
    }


def _rolled_out(job: Job) -> RolloutResult | None:
    """The rollout of this plan, where the run has one: what the plan does with all rows is known then."""
    if not job.states["rollout"].fresh:
        return None
    found: RolloutResult = job.record("rollout")
    return found if found.status == "measured" else None


def _flags_stand(record: ScreenResult, old: ScreenResult) -> bool:
    """Whether flags set anew lie well within the rows that were scored exactly.

    Those are the first ones by what was flagged by then: by score, or by score at mean length.
    """
    if record.method == "exact":
        return True
    alike = record.lengths is None or record.asked == old.asked
    return alike and 2 * len(record.flagged) <= int(record.exact.sum())


def _screened_before(job: Job) -> ScreenResult | None:
    """A stored screening that differs in nothing but which of its scores are flagged.

    Whether a share is asked for is one of the things by which `screen.score: auto` chooses, where a point
    lies too early: then such scores are no answer to the other question.
    """
    state = job.states["screen"]
    if state.fresh or any(reason.kind == "damaged" for reason in state.reasons):
        return None
    new = state.ingredients
    old = (job.rundir.manifest("screen") or {}).get("ingredients")
    if not old:
        return None

    def scoring(given: Mapping[str, Any]) -> dict[str, Any]:
        settings = {k: v for k, v in given["config"]["screen"].items() if k not in FLAGGING}
        # The settings of the rollout, and what is said along it, serve the what-if alone.
        others = dict.fromkeys(("rollout", *SAID, *BAND))
        return {**given, "config": {**given["config"], "screen": settings, **others}}

    if stage_key(scoring(old)) != stage_key(scoring(new)):
        return None
    from arisk.screening.run import unsettled

    record: ScreenResult = job.record("screen")
    asked = [given["config"]["screen"]["drop"] is not None for given in (old, new)]
    alike = asked[0] == asked[1] or job.config.screen.score != "auto" or not unsettled(record)
    return record if alike else None


def _split(job: Job, made: ScreenResult, workspace: Path) -> dict[str, Any]:
    """Kept and flagged rows as JSONL, where the rows come from a file or the hub."""
    data, rows = job.config.finetune, job.task.finetune.rows
    if job.config.model.source != "hf" or data is None:
        return {"files": [], "files_missing": "rows of a Python loader are scored by number only"}

    flagged = frozenset(made.flagged)
    exact, at_mean = made.exact.tolist(), made.at_mean_length.tolist()
    rank = {row: place for place, row in enumerate(made.order, start=1)}
    added = [
        {
            "arisk_score": score,
            **({} if made.lengths is None else {"arisk_at_mean_length": at_mean[row]}),
            "arisk_rank": rank[row],
            **({} if exact[row] else {"arisk_estimate": made.method}),
            "arisk_reasons": made.reasons(row) if row in flagged else [],
        }
        for row, score in enumerate(made.scores.tolist())
    ]
    places = [(row["source"], row["line"]) for row in rows]
    split_rows(data, places, added, flagged, workspace, show_text=job.config.report.show_text)
    return {"files": [KEPT_FILE, FLAGGED_FILE], "files_missing": None}


def _section(job: Job, later: Mapping[str, Any]) -> Section | None:
    """What screen shows on the report."""
    del later
    if not job.states["screen"].fresh:
        return None
    from arisk.screening import page

    shown = job.config.report
    found: ScreenResult = job.record("screen")
    return page.section(
        found, show_text=shown.show_text, max_examples=shown.max_examples, kept=_kept_path(job)
    )


def _kept_path(job: Job) -> str:
    """The file of rows that are not flagged, where one `finetune.path` can name it."""
    path = job.rundir.stage_dir("screen") / KEPT_FILE
    several = job.config.finetune is None or isinstance(job.config.finetune, tuple)
    return "" if several or not path.exists() else str(path)


def _found(folder: Path, config: Config) -> dict[str, Any]:
    from arisk.screening.record import ScreenResult

    del config
    return read_record(folder, ScreenResult).as_json()


def _share(text: str) -> float:
    """`5%` or `0.05`, strictly between 0 and 1."""
    body = text.strip()
    try:
        value = float(body[:-1]) / 100 if body.endswith("%") else float(body)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise ConfigError(
            f"{text!r} is no share of the rows",
            where="--drop",
            fix="give a percentage such as 5%, or a number strictly between 0 and 1",
        )
    return value


SCREEN = Stage(
    name="screen",
    version=15,
    help="Rank the fine-tuning rows by the harm they push; write kept.jsonl and flagged.jsonl",
    run=_screen,
    config=("model", "safety", "finetune", "control", "training", "rollout", "screen", *JUDGED, *SAID, *BAND),
    config_also=where_hidden(),
    inputs=("model", "adapter", "safety", "finetune", "control"),
    optional=True,
    parallel=True,
    resume_files=("point-*.safetensors", "rows-*.safetensors"),
    record="arisk.screening.record:ScreenResult",
    cost="arisk.screening.cost:screen_cost",
    section=_section,
    options=(
        StageOption(
            "drop",
            "screen.drop",
            "Flag this share of the rows (5% or 0.05) in place of the rule.",
            metavar="SHARE",
            parse=_share,
            shown=True,  # The share decides what the record holds.
        ),
    ),
    example="--drop 5%",
    found=_found,
    text="arisk.screening.page:screen_text",
)
