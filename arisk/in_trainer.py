"""A forecast inside a training script: `preflight(trainer)`, and a callback that watches afterwards.

`AxolotlPlugin` puts that callback into axolotl's trainer: `plugins: [arisk.in_trainer.AxolotlPlugin]` and
`arisk: {safety: refusals.jsonl}` in its YAML. A run with `sample_packing` is refused, as rows are packed in
the sampler there.

The trainer is left as found: parameters, optimizer, random state and the order of rows. What is trained
afterwards equals a training without a preflight, to the bit.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel

from arisk.api import assess
from arisk.base.errors import ConfigError, GateError, InconclusiveError
from arisk.base.processes import alone
from arisk.base.task import Progress, Task, silent
from arisk.config.python import PipelineConfig
from arisk.config.yaml import validate_mapping
from arisk.gradients import evaluating
from arisk.models.from_trainer import (
    Planned,
    as_loaded,
    foreign_optimizer,
    loss_notes,
    planned_by,
    require_length,
    settings_of,
    task_of,
    tokenizer_of,
    trainer_of,
)
from arisk.models.judge import Exchange, Judge, judge_for, learnt_openings
from arisk.models.loaders import keeping_random_state
from arisk.risk_report import RiskReport
from arisk.training.behaviour import spread_rows
from arisk.training.panels import Panel, panel_of

__all__ = ["AxolotlArgs", "PreflightCallback", "axolotl_plugin", "preflight"]

LEVELS = ("low", "elevated", "high")
#: Safety rows whose loss is measured on the way, and prompts that are answered.
WATCHED_ROWS, WATCHED_PROMPTS = 64, 16


def preflight(
    trainer: Any,
    *,
    safety: Any,
    control: Any = None,
    probes: Mapping[str, Any] | None = None,
    config: PipelineConfig | Mapping[str, Any] | None = None,
    fail_on: Literal["low", "elevated", "high"] | None = None,
    progress: Progress = silent,
) -> RiskReport:
    """Forecast what a trainer's `train()` will do to safety; the trainer is left as found.

    The verdict goes to the trainer's log as well, and so to whatever it reports to.

    Args:
        trainer: a transformers `Trainer` or TRL `SFTTrainer`, before its `train()`.
        safety: prompts with safe responses: a file, a list of mappings, a `datasets.Dataset`, or the
            settings of a data set (`{"path": …, "max_samples": 96}`).
        control: ordinary rows in the same forms, the null that drift is held against; optional.
        probes: further rows by name, what else the fine-tune may cost, in the same forms or as the settings
            of a probe (`{"maths": {"path": …, "measure": "choice"}}`); optional.
        config: settings of the stages. What its `training` sets wins over the trainer's arguments.
        fail_on: raise where the verdict reaches this level.
        progress: told of finished parts.

    Returns:
        The report, as `arisk run` would make it of the same plan.

    Raises:
        GateError: the verdict reached `fail_on`.
        InconclusiveError: a level was asked for, and the verdict cannot be vouched for.
        AriskError: what is wrong with the trainer, its rows, or the safety rows.
    """
    _require_level(fail_on, "preflight(fail_on=…)")
    with keeping_random_state(), alone():
        planned = planned_by(trainer)
        _, report = _forecast(planned, _settings(config), safety, control, progress, probes)
    _log(trainer, trainer.state, _found(report))
    _gate(report, fail_on)
    return report


def _settings(config: PipelineConfig | Mapping[str, Any] | None) -> PipelineConfig:
    if not isinstance(config, PipelineConfig):
        config = validate_mapping(PipelineConfig, dict(config or {}), "config")
    # Before a training, what says why may not cost more than its share.
    return config if "why" in config.model_fields_set else config.model_copy(update={"why": "auto"})


def _forecast(
    planned: Planned,
    config: PipelineConfig,
    safety: Any,
    control: Any,
    progress: Progress,
    probes: Mapping[str, Any] | None = None,
) -> tuple[Task, RiskReport]:
    settings, notes = settings_of(planned, config)
    with as_loaded(planned.model):
        task = task_of(planned, settings, safety, control, notes, probes)
        return task, assess(task, settings, progress=progress)


def _found(report: RiskReport) -> dict[str, float]:
    """The verdict in numbers, as loggers take them: level 0 low, 1 elevated, 2 high, −1 inconclusive."""
    verdict, refusals = report.verdict, report.forecasted.refusals
    level = LEVELS.index(verdict.level) if verdict.level in LEVELS else -1
    found: dict[str, float | None] = {
        "arisk/level": level,
        "arisk/probability": verdict.probability,
        "arisk/collapse_step": verdict.collapse_step,
        "arisk/safe_steps": verdict.safe_steps,
    }
    curve = report.forecasted.forecasters.get(verdict.basis)
    if curve is not None and len(curve.median):
        found["arisk/forecast_safety_drift"] = float(curve.median[-1])
    if refusals is not None and refusals.status == "measured":
        found["arisk/refused_today"] = refusals.today
        found["arisk/forecast_refused"] = refusals.at_end[0]
    return {name: float(value) for name, value in found.items() if value is not None}


def _log(trainer: Any, state: Any, values: dict[str, float]) -> None:
    """Put values into the trainer's log; its own metrics stay where they are.

    Trainers of TRL hand out and clear what they have gathered in training mode at every `log`, and a log
    that is due in this step would be taken for done.
    """
    if trainer is None:
        state.log_history.append({**values, "step": state.global_step})
        return
    due = trainer.control.should_log
    with evaluating(trainer.model):
        trainer.log(dict(values))
    trainer.control.should_log = due


def _require_level(level: str | None, where: str) -> None:
    if level is not None and level not in LEVELS:
        raise ConfigError(f"there is no level {level!r}", where=where, fix=f"one of {', '.join(LEVELS)}")


def _gate(report: RiskReport, fail_on: str | None) -> None:
    if fail_on is None:
        return
    verdict, where = report.verdict, f"fail_on={fail_on!r}"
    if verdict.level == "inconclusive":
        raise InconclusiveError(
            f"a gate was asked for and the verdict is inconclusive: {verdict.sentence}",
            where=where,
            fix="read `report.verdict.reasons`, and measure more (more safety rows, a longer rollout)",
        )
    if LEVELS.index(verdict.level) >= LEVELS.index(fail_on):
        raise GateError(
            f"the training was stopped before its first step, as the verdict is {verdict.level}: "
            f"{verdict.sentence}",
            where=where,
            fix="lower the learning rate or the steps (`report.forecasted.what_if`), or change the data",
        )


class PreflightCallback:
    """A callback of transformers' and TRL's trainers: a forecast before step 1, a watch afterwards.

    `trainer.add_callback(arisk.PreflightCallback(safety="safety.jsonl", fail_on="high", watch_every=25))`.
    A run that is resumed from a checkpoint gets no forecast; it is watched against where it goes on from.

    Args:
        safety: as of `preflight`.
        control: as of `preflight`.
        probes: as of `preflight`.
        config: as of `preflight`.
        fail_on: level of the verdict at which training is stopped before its first step, by a `GateError`
            (`InconclusiveError` where the verdict cannot be vouched for); None only tells.
        watch_every: optimizer steps between measurements; 0 watches nothing.
        stop_at_threshold: end the training where the measured safety loss has risen by
            `forecast.collapse_threshold`; otherwise a warning is all.

    Attributes:
        report: the forecast; None before it is made.
        history: (step, rise of the safety loss in nats per token, share of prompts refused or None).
        stopped_at: step at which training was ended; None where it was not.
    """

    def __init__(
        self,
        *,
        safety: Any,
        control: Any = None,
        probes: Mapping[str, Any] | None = None,
        config: PipelineConfig | Mapping[str, Any] | None = None,
        fail_on: Literal["low", "elevated", "high"] | None = None,
        watch_every: int = 25,
        stop_at_threshold: bool = False,
    ) -> None:
        _require_level(fail_on, "PreflightCallback(fail_on=…)")
        if watch_every < 0:
            raise ConfigError(
                "`watch_every` is negative", where="PreflightCallback", fix="give a number of steps, or 0"
            )
        self.safety, self.control, self.config = safety, control, _settings(config)
        self.probes = probes
        self.fail_on = fail_on
        self.watch_every = watch_every
        self.stop_at_threshold = stop_at_threshold
        self.report: RiskReport | None = None
        self.history: list[tuple[int, float, float | None]] = []
        self.stopped_at: int | None = None
        self._watch: _Watch | None = None

    def __getattr__(self, name: str) -> Any:
        """Events that this callback has nothing to say about."""
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forecast, log, and stop where the verdict asks for it.

        Raises:
            GateError: the verdict reached `fail_on`.
            AriskError: what is wrong with the plan or the safety rows.
        """
        del control
        trainer = trainer_of(inspect.currentframe(), self)
        model, loader = kwargs["model"], kwargs["train_dataloader"]
        require_length(loader.dataset, args)
        planned = Planned(
            model,
            args,
            loader,
            tokenizer_of(kwargs.get("processing_class")),
            foreign_optimizer(trainer, kwargs.get("optimizer")),
            loss_notes(trainer),
        )
        resumed = state.global_step > 0
        with keeping_random_state(), alone():
            if resumed:
                settings, notes = settings_of(planned, self.config)
                task = task_of(planned, settings, self.safety, None, notes)
            else:
                task, self.report = _forecast(
                    planned, self.config, self.safety, self.control, silent, self.probes
                )
            if self.watch_every:
                self._watch = _Watch(task, self.config)
                self._measure(state.global_step, model)
        if resumed:
            warnings.warn(
                f"arisk: training goes on from step {state.global_step}, so there is no forecast; safety is "
                "watched against this point",
                stacklevel=2,
            )
        if self.report is not None:
            _log(trainer, state, _found(self.report))
            _gate(self.report, self.fail_on)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where it is due, log, and warn."""
        del args
        if self._watch is None or state.global_step % self.watch_every:
            return
        trainer = trainer_of(inspect.currentframe(), self)
        with keeping_random_state(), alone():
            said = self._measure(state.global_step, kwargs["model"])
        step, drift, refused = self.history[-1]
        values = {"arisk/safety_drift": drift, "arisk/safety_loss": self._watch.start + drift}
        _log(trainer, state, values | ({} if refused is None else {"arisk/refused": refused}))
        if said:
            warnings.warn(f"arisk: step {step}: {said}", stacklevel=2)
            if self.stop_at_threshold and not drift < self.config.forecast.collapse_threshold:
                self.stopped_at = step
                control.should_training_stop = True

    def _measure(self, step: int, model: Any) -> str:
        """Measure the model in place; what there is to warn of."""
        assert self._watch is not None
        with as_loaded(model), evaluating(model), torch.no_grad():
            loss, refused = self._watch.measured(model)
        if not self.history:
            self._watch.start = loss
        drift = loss - self._watch.start
        self.history.append((step, drift, refused))
        said: list[str] = []
        limits = self.config.forecast
        # NaN is not below any threshold.
        if not drift < limits.collapse_threshold:
            said.append(f"the safety loss has risen by {drift:.3f} nats per token")
        first = self.history[0][2]
        if refused is not None and first and refused <= (1 - limits.refusals_lost) * first:
            said.append(f"{refused:.0%} of the safety prompts are refused, {first:.0%} were at the start")
        return "; ".join(said)


def _nothing(*args: Any, **kwargs: Any) -> None:
    del args, kwargs


class _Watch:
    """Safety rows that are measured on the model in place."""

    def __init__(self, task: Task, config: PipelineConfig) -> None:
        device = next(task.model.parameters()).device
        self.panel: Panel = panel_of(task.safety, WATCHED_ROWS, device)
        self.start = float("nan")
        self.samples = task.safety
        self.rows = spread_rows(len(task.safety.rows), WATCHED_PROMPTS) if task.safety.generate else []
        self.tokens = config.behaviour.tokens
        told = [str(row.get("response") or "") for row in task.safety.rows]
        self.judge: Judge = judge_for(config.behaviour, learnt_openings(told, ()))

    def measured(self, model: Any) -> tuple[float, float | None]:
        """Mean safety loss (nats per token), and the share of prompts that is refused."""
        loss = float(self.panel.losses(model).mean())
        if not self.rows or self.samples.generate is None:
            return loss, None
        texts = self.samples.generate(model, self.rows, self.tokens)
        prompts = [str(self.samples.rows[i].get("prompt") or "") for i in self.rows]
        outcomes = self.judge([Exchange(p, str(t)) for p, t in zip(prompts, texts, strict=True)])
        return loss, outcomes.count("refused") / len(outcomes)


class AxolotlArgs(BaseModel):
    """What the plugin adds to axolotl's config."""

    arisk: dict[str, Any] | None = None
    """Arguments of `PreflightCallback`: `{safety: refusals.jsonl, fail_on: high, watch_every: 25}`."""


def axolotl_plugin() -> type[Any]:
    """The class that axolotl loads as `arisk.in_trainer.AxolotlPlugin`.

    It derives from axolotl's `BasePlugin`, so it is made where axolotl is installed.

    Source: axolotl, docs/custom_integrations.qmd and `axolotl.integrations.base`.
    """
    base: Any = importlib.import_module("axolotl.integrations.base").BasePlugin

    class AxolotlPlugin(base):  # pyright: ignore[reportUntypedBaseClass] - axolotl is not installed here
        """Adds a preflight to axolotl's trainer."""

        def get_input_args(self) -> str:
            """The class of the plugin's settings, by name."""
            return "arisk.in_trainer.AxolotlArgs"

        def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[PreflightCallback]:
            """The callback, which finds the trainer itself.

            Raises:
                ConfigError: the settings are missing or wrong.
            """
            del trainer
            return [_callback(cfg.get("arisk"))]

    return AxolotlPlugin


def _callback(given: Any) -> PreflightCallback:
    """A callback of settings from a YAML file.

    Raises:
        ConfigError: there are none, or the callback has no such argument.
    """
    known = list(inspect.signature(PreflightCallback).parameters)
    settings = _plain(given) if isinstance(given, Mapping) else {}
    unknown = sorted(set(settings) - set(known))
    if unknown or "safety" not in settings:
        what = f"it has no setting {unknown[0]!r}" if unknown else "it names no safety rows"
        raise ConfigError(
            f"the plugin's section cannot be used: {what}",
            where="arisk: (of axolotl's config)",
            fix=f"give `arisk: {{safety: refusals.jsonl}}`; settings are {', '.join(known)}",
        )
    return PreflightCallback(**settings)


def _plain(value: Any) -> Any:
    """Mappings of any kind as dictionaries: axolotl's answer None for what they lack."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def __getattr__(name: str) -> Any:
    if name == "AxolotlPlugin":
        return axolotl_plugin()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
