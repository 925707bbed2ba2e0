"""The Python API: assess the planned fine-tuning of any torch model, from loaders and loss functions.

Works in memory and a temporary folder; the command line works on the same stages with a run
directory. The caller's model, gradients and random state are left as found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from arisk.anatomy.record import SubspaceResult
from arisk.assessment import assess
from arisk.base.checked_loss import checked_loss
from arisk.base.errors import ConfigError
from arisk.base.task import Batch, LossFn, Progress, SampleSet, Task, silent
from arisk.config.plan import planned_steps
from arisk.config.python import PipelineConfig
from arisk.config.yaml import validate_mapping
from arisk.forecast.run import skipped_records
from arisk.guard import AlignGuardConfig, LoRAMitigator, build_mitigator, weight_sites
from arisk.models.loaders import keeping_random_state, kept, taken
from arisk.models.selection import allowed_parameters, lora_names, lora_pairs, select_parameters
from arisk.peer import SensitivitySubspace
from arisk.risk_report import RiskReport

__all__ = ["AlignmentRiskPipeline"]

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
