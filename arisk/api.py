"""The Python API: assess, verify, screen and protect the planned fine-tuning of any torch model.

One driver serves this and the command line: the stages of the catalogue run here too, on a task in memory and
a run directory in a temporary folder. The caller's model, gradients and random state are left as found.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arisk.anatomy.record import CollectResult, SubspaceResult
from arisk.anatomy.stage import safety_side
from arisk.base.errors import ConfigError
from arisk.base.task import Batch, LossFn, ProbeRows, Progress, SampleSet, Task, silent
from arisk.base.terminal import StageDisplay
from arisk.catalogue import catalogue
from arisk.config.plan import Config, planned_steps, probe_section
from arisk.config.python import PipelineConfig
from arisk.config.yaml import validate_mapping
from arisk.engine.job import Job
from arisk.engine.run import run_task
from arisk.forecast.run import skipped_records
from arisk.guard import AlignGuardConfig, LoRAMitigator, build_mitigator, weight_sites
from arisk.guard.record import GuardResult
from arisk.models.loaders import checked_loss, keeping_random_state, kept, taken
from arisk.models.losses import per_sample_nll
from arisk.models.selection import allowed_parameters, lora_names, lora_pairs, select_parameters
from arisk.peer import SensitivitySubspace
from arisk.risk_report import RiskReport
from arisk.screening.record import ScreenResult
from arisk.verification.record import VerifyResult

__all__ = ["AlignmentRiskPipeline", "assess", "protect", "screen", "verify"]

#: Batches of ordinary data read from a loader.
CONTROL_BATCHES = 64


class AlignmentRiskPipeline:
    """Assess planned fine-tunes of torch models.

    Args:
        config: a `PipelineConfig`, or a mapping validated like the YAML; default full mode.
    """

    def __init__(self, config: PipelineConfig | Mapping[str, Any] | None = None) -> None:
        if config is None:
            config = PipelineConfig()
        elif not isinstance(config, PipelineConfig):
            config = validate_mapping(PipelineConfig, dict(config), "PipelineConfig")
        self.config = config
        self._data: tuple[SampleSet, SampleSet] | None = None

    def run(
        self,
        model: nn.Module,
        safety_dataloader: Iterable[Batch],
        safety_loss_fn: LossFn,
        fine_tune_dataloader: Iterable[Batch],
        fine_tune_loss_fn: LossFn,
        *,
        control_dataloader: Iterable[Batch] | None = None,
        control_loss_fn: LossFn | None = None,
        probes: Sequence[ProbeRows] = (),
        progress: Progress = silent,
    ) -> RiskReport:
        """Measure, forecast and judge the planned fine-tune of `model`.

        The model, its gradients, modes and flags, and the global random states are left as found.

        Args:
            model: the aligned model.
            safety_dataloader: batches of safety samples.
            safety_loss_fn: `(model, batch)` → per-sample losses (B,), or their mean as a scalar.
            fine_tune_dataloader: batches in training order, one micro-batch each, repeated when the
                plan needs more. A one-shot iterator is read once, as far as the plan goes.
            fine_tune_loss_fn: the fine-tuning loss, as above.
            control_dataloader: ordinary data, the null of the overlap; optional.
            control_loss_fn: its loss; default the fine-tuning loss.
            probes: further rows, each with a measure: what else the fine-tune costs.
            progress: told of finished parts.

        Returns:
            The report; its status is "skipped" where `require_lora_match` is off and the model has no
            LoRA weights.

        Raises:
            AriskError: what is wrong, where, and how to fix it.
        """
        config = self.config
        if config.mode == "lora" and not config.require_lora_match and not self._lora(model):
            reason = "mode is lora, and the model has no LoRA parameters"
            return RiskReport(*skipped_records(reason, config.training, config.forecast), "skipped", reason)
        with keeping_random_state():
            task = self.task(
                model=model,
                safety_dataloader=safety_dataloader,
                safety_loss_fn=safety_loss_fn,
                fine_tune_dataloader=fine_tune_dataloader,
                fine_tune_loss_fn=fine_tune_loss_fn,
                control_dataloader=control_dataloader,
                control_loss_fn=control_loss_fn,
                probes=probes,
            )
            return assess(task, config, progress=progress)

    def task(
        self,
        *,
        model: nn.Module,
        safety_dataloader: Iterable[Batch],
        safety_loss_fn: LossFn,
        fine_tune_dataloader: Iterable[Batch],
        fine_tune_loss_fn: LossFn,
        control_dataloader: Iterable[Batch] | None = None,
        control_loss_fn: LossFn | None = None,
        heldout_dataloader: Iterable[Batch] | None = None,
        probes: Sequence[ProbeRows] = (),
    ) -> Task:
        """The task that `run` assesses, for `assess` and `verify`.

        Args:
            model: the aligned model; with the next six, as in `run`.
            safety_dataloader: as in `run`.
            safety_loss_fn: as in `run`.
            fine_tune_dataloader: as in `run`.
            fine_tune_loss_fn: as in `run`.
            control_dataloader: as in `run`.
            control_loss_fn: as in `run`.
            heldout_dataloader: safety samples that no forecast may see, measured by `verify` alone.
            probes: as in `run`.

        Raises:
            AriskError: what is wrong, where, and how to fix it.
        """
        config, seed = self.config, self.config.seed
        safety_loss_fn = checked_loss(safety_loss_fn, "safety_loss_fn")
        fine_tune_loss_fn = checked_loss(fine_tune_loss_fn, "fine_tune_loss_fn")
        first = taken(safety_dataloader, "safety", samples=config.fisher.max_samples, seed=seed)
        safety = SampleSet("safety", first, safety_loss_fn)
        planned = kept(fine_tune_dataloader, "fine_tune", self._batches_needed(), seed)
        finetune = SampleSet("finetune", planned, fine_tune_loss_fn)
        control = heldout = None
        if control_dataloader is not None:
            loss_fn = checked_loss(control_loss_fn or fine_tune_loss_fn, "control_loss_fn")
            ordinary = taken(control_dataloader, "control", batches=CONTROL_BATCHES, seed=seed)
            control = SampleSet("control", ordinary, loss_fn)
        if heldout_dataloader is not None:
            heldout = SampleSet("heldout", taken(heldout_dataloader, "heldout", seed=seed), safety_loss_fn)
        self._data = (safety, finetune)
        names = self._selected(model)
        return Task(
            model=model,
            safety=safety,
            finetune=finetune,
            control=control,
            parameter_names=names,
            lora_pairs=lora_pairs(model, names),
            description={"model": type(model).__name__, "mode": config.mode},
            heldout=heldout,
            probes=[_read(probe, seed) for probe in probes],
        )

    def _selected(self, model: nn.Module) -> list[str]:
        """Names of the parameters that train."""
        config = self.config
        parameters = list(model.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            raise ConfigError(
                "no parameter of the model requires a gradient, so nothing would be trained",
                where="model",
                fix="call `requires_grad_(True)` on what the fine-tune trains, or attach an adapter",
            )
        if config.fisher.parameter_names is not None:
            return allowed_parameters(model, config.fisher.parameter_names)
        if config.mode == "full":
            return select_parameters(model, "full")
        return self._lora(model) or select_parameters(model, "lora")

    def _lora(self, model: nn.Module) -> list[str]:
        return lora_names(model, self.config.lora_name_markers)

    def build_lora_mitigator(
        self,
        model: nn.Module,
        subspace: SubspaceResult | SensitivitySubspace | None = None,
        *,
        config: AlignGuardConfig | None = None,
        safety: SampleSet | None = None,
        require_lora_match: bool | None = None,
    ) -> LoRAMitigator:
        """A penalty that keeps fine-tuning off what the safety of `model` is sensitive to.

        Its directions are measured here, in ΔW coordinates, on the safety batches that `run` saw.

        Args:
            model: the model before fine-tuning, adapter attached (mode `full`: its own weights are guarded).
            subspace: `report.subspace`, whose rank is used where the config names none.
            config: weights and form; default the peer's.
            safety: other safety samples; needed where this pipeline has not run.
            require_lora_match: False gives a skipped mitigator where LoRA pairs are missing; default
                the config's.

        Raises:
            ConfigError: adapter pairs or safety samples are missing.
        """
        seen, finetune = self._data or (None, None)
        return build_mitigator(
            model,
            safety or seen,
            config,
            sites=weight_sites(select_parameters(model, "full")) if self.config.mode == "full" else None,
            finetune=finetune,
            rank=(subspace.rank or None) if subspace else None,
            require_lora_match=self.config.require_lora_match
            if require_lora_match is None
            else require_lora_match,
        )

    def _batches_needed(self) -> int:
        """Micro-batches of the whole plan, or those of the scores when they are more."""
        training = self.config.training
        steps = planned_steps(training, 0) if training.epochs is None else 0
        scores = max(self.config.score.batches, self.config.score.hvp_batches)
        return max(scores, steps * training.gradient_accumulation)


def _read(probe: ProbeRows, seed: int) -> ProbeRows:
    """A probe whose loader is read once."""
    name, given = probe_section(probe.name), probe.samples
    loss_fn = given.loss_fn
    if loss_fn is not per_sample_nll:
        loss_fn = checked_loss(loss_fn, f"loss_fn of {name}")
    batches = taken(given.batches, name, seed=seed)
    return replace(probe, samples=replace(given, name=name, batches=batches, loss_fn=loss_fn))


def assess(task: Task, config: PipelineConfig, *, progress: Progress = silent) -> RiskReport:
    """Forecast what a task's plan does to safety, and say why, in a temporary run directory.

    Args:
        task: the model with its data.
        config: settings of every stage.
        progress: told of finished parts.

    Raises:
        AriskError: what is wrong, where, and how to fix it.
    """
    why = ("collect", "subspace", "score") if config.why != "off" else ()
    with _carried_out(task, config, ["rollout", "forecast", *why], progress) as job:
        why = why if why and job.states["score"].fresh else ()
        collected, space, scored = [job.record(name) for name in why] if why else [None] * 3
        return RiskReport(
            collected,
            space,
            scored,
            job.record("rollout"),
            job.record("forecast"),
            basis=_basis(job) if why else None,
        )


def verify(task: Task, config: PipelineConfig, *, progress: Progress = silent) -> VerifyResult:
    """Really fine-tune as planned and measure safety along the way; the model is put back to the bit.

    `RiskReport.compare` lays the outcome over a forecast.

    Args:
        task: any torch module with its data and losses; `task.heldout` is measured where it is given,
            else the safety samples themselves.
        config: the planned training, and `config.verify`.
        progress: told of optimizer steps done.

    Raises:
        AriskError: what is wrong, where, and how to fix it.
    """
    with _carried_out(task, config, ["verify"], progress) as job:
        return job.record("verify")


def screen(task: Task, config: PipelineConfig, *, progress: Progress = silent) -> ScreenResult:
    """Rank the fine-tuning rows by the harm that each is predicted to push, and flag the harmful ones.

    `result.order` is the ranking, `result.scores` the harm per unit learning rate, `result.flagged` what
    leaves the null behind. With `config.screen.what_if`, the plan is rolled out with and without the flagged
    rows, where the loader can be regrouped.

    Args:
        task: any torch module with its data and losses.
        config: the planned training, and `config.screen`.
        progress: told of rows scored.

    Raises:
        AriskError: what is wrong, where, and how to fix it.
    """
    with _carried_out(task, config, ["screen"], progress) as job:
        return job.record("screen")


def protect(task: Task, config: PipelineConfig, *, progress: Progress = silent) -> GuardResult:
    """Carry out the planned fine-tune plain and under every protection, each from the same start and seed.

    Args:
        task: any torch module with its data and losses.
        config: the planned training, and `config.guard`.
        progress: told of optimizer steps done.

    Raises:
        AriskError: what is wrong, where, and how to fix it.
    """
    with _carried_out(task, config, ["guard"], progress) as job:
        return job.record("guard")


@contextmanager
def _carried_out(
    task: Task, config: PipelineConfig, stages: Sequence[str], progress: Progress
) -> Generator[Job]:
    """The finished job, while its run directory lives."""
    with tempfile.TemporaryDirectory(prefix="arisk-") as folder:
        yield run_task(
            catalogue(),
            task,
            _resolved(config),
            stages,
            run_dir=Path(folder),
            show=_Listening(progress),
        )


def _resolved(config: PipelineConfig) -> Config:
    """The settings as the config of a run whose model and data are in memory."""
    sections = ("training", "score", "behaviour", "rollout", "forecast", "verify", "screen", "guard")
    settings = {name: getattr(config, name).model_dump() for name in sections}
    settings |= {
        "collect": config.collect_settings.model_dump(),
        "subspace": config.subspace_settings.model_dump(),
    }
    model = {"source": "python", "entry": "arisk:Task"}
    return Config.model_validate(
        {"model": model, "why": config.why, "run": {"seed": config.seed}, **settings}
    )


class _Listening(StageDisplay):
    """Shows nothing; the caller hears of finished parts."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(quiet=True)
        self._heard = progress

    def progress(self, label: str, done: int, total: int) -> None:
        """Part of the running stage is done."""
        self._heard(label, done, total)


def _basis(job: Job) -> Tensor | None:
    """(P, k) b_j = Gᵀu_j/√(Nλ_j), or unit vectors of `diag_topk`; None above the memory budget."""
    collected: CollectResult = job.record("collect")
    space: SubspaceResult = job.record("subspace")
    parameters = collected.fisher_diagonal.numel()
    size = parameters * space.rank * collected.fisher_diagonal.element_size()
    if collected.store == "gram" or size > job.config.collect.memory_budget_gb * 1e9:
        return None
    if space.method == "diag_topk":
        basis = torch.zeros(parameters, space.rank, dtype=collected.fisher_diagonal.dtype)
        basis[space.coordinates, torch.arange(space.rank)] = 1
        return basis
    side = safety_side(job)
    weights = space.dual_vectors / torch.sqrt(len(space.dual_vectors) * space.eigenvalues)
    blocks = [side.columns(name).to(torch.float64).T @ weights for name in collected.parameter_names]
    return torch.cat(blocks).to(collected.fisher_diagonal.dtype)
