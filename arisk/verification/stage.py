"""Stage verify: how it runs on a job, and what its verb prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base.artifacts import WORKSPACES, disk_error, read_record
from arisk.base.errors import ConfigError
from arisk.engine.job import Job
from arisk.engine.stage import Stage, StageOption, steps_option
from arisk.forecast.stage import BEHAVIOUR_KEYS, JUDGE_KEYS, kept_of, measured_beside

if TYPE_CHECKING:
    from arisk.config.plan import Config
    from arisk.report.page import Section
    from arisk.verification.record import VerifyResult

__all__ = ["VERIFY", "model_saver", "refuse_saving", "save_option"]


def _verify(job: Job, workspace: Path) -> VerifyResult:
    from arisk.verification.run import measures_task, verify

    config = job.config
    _refuse(config)
    # The stage's own reach, to which its key belongs: a damaged stage is made again as it was.
    reach = job.states["verify"].ingredients["config"]["verify.steps"]
    known = _carried_out_before(job, reach)
    if known is not None:
        job.show.note("the forecast carried this plan out: its measurements are taken over")
        return known
    found = verify(
        job.task,
        config=config.verify.model_copy(update={"steps": reach}),
        training=config.training,
        steps=job.planned_steps(),
        seed=config.run.seed,
        behaviour=config.behaviour,
        workspace=workspace,
        keep=model_saver(job, config.verify.save_model),
        task_samples=config.guard.task_samples if measures_task(config) else 0,
        progress=job.show.progress,
    )
    if found.diverged_at is not None and config.verify.save_model is not None:
        job.show.note("no model is kept: training diverged")
    return replace(found, behaviour=kept_of(config, found.behaviour))


def _carried_out_before(job: Job, reach: int | None) -> VerifyResult | None:
    """What the rollout measured where it was this very run: the same steps, rows and seed.

    Held-out rows are none of the forecast's, so they need a run of their own, as does a model that is kept.
    """
    from arisk.forecast.record import RolloutResult
    from arisk.verification.run import taken_over

    config = job.config
    alike = config.rollout.eval_samples is None and (
        config.rollout.control_samples == config.verify.control_samples
    )
    if not (job.states["rollout"].fresh and alike) or config.verify.safety is not None:
        return None
    rolled: RolloutResult = job.record("rollout")
    far = reach is None or reach >= rolled.horizon
    if (
        not (rolled.carried_out and far and rolled.diverged_at is None)
        or config.verify.save_model is not None
    ):
        return None
    # A task from Python may hold such rows.
    if config.model.source == "python" and job.task.heldout is not None:
        return None
    return taken_over(rolled)


def _refuse(config: Config) -> None:
    refuse_saving(config, config.verify.save_model, "verify.save_model")


def refuse_saving(config: Config, folder: Path | None, setting: str) -> None:
    """Refuse a folder for the tuned model before it is trained; nothing is refused without one.

    Args:
        config: of the run.
        folder: the folder; None: no model is kept.
        setting: dotted config key that names it.

    Raises:
        ConfigError: the task is one from Python, or the folder is in use or cannot be made.
    """
    if folder is None:
        return
    where = f"{setting}: {folder}"
    if config.model.source == "python":
        raise ConfigError(
            "a task from Python has no model that `save_pretrained` writes",
            where=where,
            fix="leave it out, and save the model in the code that trains it",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # What a stopped run left half written may go.
        used = next((file for file in folder.iterdir() if file.name != WORKSPACES), None)
    except OSError as err:
        raise ConfigError(
            f"the folder for the tuned model cannot be made: {err.strerror}",
            where=where,
            fix="name a new folder in a place that may be written to",
        ) from err
    if used is not None:
        raise ConfigError(
            f"the folder for the tuned model is not empty: it holds {used.name}",
            where=where,
            fix="name a new folder; nothing is overwritten",
        )


def model_saver(job: Job, folder: Path | None) -> Callable[[Any], None] | None:
    """Writes the tuned model into a folder, as save_pretrained does; None where there is none."""
    if folder is None:
        return None

    def keep(model: Any) -> None:
        from arisk.engine.rundir import remove_tree
        from arisk.models.loading import save_tuned

        # Whole or not at all: what lies half written is below a name that no loader looks at.
        begun = folder / WORKSPACES
        remove_tree(begun)
        save_tuned(model, job.config.model, begun)
        try:
            # The files that say that here is a model come last.
            for file in sorted(begun.iterdir(), key=lambda file: file.name.endswith("config.json")):
                file.replace(folder / file.name)
            begun.rmdir()
        except OSError as err:
            raise disk_error(err, folder) from err
        job.show.note(f"the tuned model is kept in {folder}")

    return keep


def save_option(setting: str, kept: str) -> StageOption:
    """`--save-model` of a stage that trains; `kept` says what is kept."""
    told = f"Keep {kept} in this folder, as save_pretrained writes it."
    return StageOption("save-model", setting, told, metavar="DIR", anew=True, parse=_folder)


def _folder(text: str) -> str:
    """A folder's name as YAML that means it to the letter."""
    if not text.strip():
        raise ConfigError(
            "the folder for the tuned model has no name",
            where=f"--save-model {text!r}",
            fix="name a new folder, or leave the option out",
        )
    with suppress(RuntimeError):  # a home that is nobody's: told where the folder is made
        text = str(Path(text).expanduser())
    return json.dumps(text, ensure_ascii=False)


def _section(job: Job, later: Mapping[str, Any]) -> Section:
    """The real run beside the forecast, where one belongs to this plan; else that there is none."""
    from arisk.models.judge import judge_for
    from arisk.verification import page
    from arisk.verification.record import compare

    del later
    forecast, check = job.record("forecast"), None
    if job.states["verify"].fresh:
        measured: VerifyResult = job.record("verify")
        judge = judge_for(job.config.behaviour, measured.behaviour.learnt)
        check = compare(measured, forecast, threshold=forecast.threshold, judge=judge)
    return page.section(check, forecast, show_text=job.config.report.show_text)


def _found(folder: Path, config: Config) -> dict[str, Any]:
    """The real run without a forecast beside it."""
    from arisk.models.judge import judge_for
    from arisk.verification.record import VerifyResult, compare

    measured = read_record(folder, VerifyResult)
    judge = judge_for(config.behaviour, measured.behaviour.learnt)
    return compare(measured, None, threshold=config.forecast.collapse_threshold, judge=judge).as_json()


#: The truth depends on the plan alone: another threshold or another judge need no new fine-tune.
VERIFY = Stage(
    name="verify",
    version=6,
    help="Really fine-tune as planned, measure safety along the way, and lay it over the forecast",
    run=_verify,
    config=(
        *("model", "safety", "finetune", "control", "training", "verify.safety", "verify.steps"),
        *("verify.control_samples", *BEHAVIOUR_KEYS),
    ),
    config_also=measured_beside,
    inputs=("model", "adapter", "safety", "finetune", "control", "probes", "verify.safety"),
    optional=True,
    reach="verify.steps",
    parallel=True,
    resume_files=("state.json", "state-*.safetensors"),
    record="arisk.verification.record:VerifyResult",
    cost="arisk.verification.run:verify_cost",
    section=_section,
    shown=JUDGE_KEYS,
    before=_refuse,
    options=(
        steps_option("verify.steps"),
        save_option("verify.save_model", "the tuned adapter or model"),
    ),
    example="--steps 100",
    found=_found,
    text="arisk.verification.page:verify_text",
    beside=True,
)
