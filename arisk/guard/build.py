"""From a model and its safety data to a mitigator."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from arisk.base.errors import ConfigError
from arisk.base.task import SampleSet
from arisk.guard.directions import fisher_mass, safety_directions
from arisk.guard.mitigator import LoRAMitigator
from arisk.guard.settings import AlignGuardConfig
from arisk.guard.sites import Site, adapter_sites

__all__ = ["build_mitigator", "matched_sites"]

#: Directions kept where neither the config nor a report names a rank.
DEFAULT_RANK = 32


def matched_sites(model: nn.Module) -> tuple[list[Site], str | None]:
    """Sites of the active adapters, and what is wrong with them, or None."""
    sites, unmatched = adapter_sites(model)
    if not sites:
        return [], "the model has no trainable LoRA pair (lora_A and lora_B of one linear layer)"
    if unmatched:
        return sites, f"the LoRA parameter {unmatched[0]!r} belongs to no (lora_A, lora_B) pair"
    return sites, None


def build_mitigator(
    model: nn.Module,
    safety: SampleSet | None,
    config: AlignGuardConfig | None = None,
    *,
    sites: Sequence[Site] | None = None,
    finetune: SampleSet | None = None,
    rank: int | None = None,
    require_lora_match: bool = True,
) -> LoRAMitigator:
    """A mitigator anchored at the model as it is, with directions measured on safety data.

    Args:
        model: the model before fine-tuning; left as found.
        safety: safety samples with their loss.
        config: weights and form; default the peer's.
        sites: guarded weights; default the active peft adapters. `weight_sites` names weights that
            train themselves.
        finetune: fine-tuning data, needed by `task_metric: fisher_diagonal` alone.
        rank: directions kept where the config names none.
        require_lora_match: False gives a mitigator that is skipped, with its reason, where a trainable
            LoRA parameter has no partner; True refuses.

    Raises:
        ConfigError: adapter pairs or the data for the metric are missing.
        InputError: a weight cannot be measured.
        NumericsError: a gradient is NaN or infinite, or all are zero.
    """
    config = config or AlignGuardConfig()
    if safety is None:
        raise ConfigError(
            "there are no safety samples to measure the directions on",
            where="build_lora_mitigator",
            fix="call `run` on the pipeline first, or pass `safety=SampleSet(...)`",
        )
    if sites is None:
        sites, problem = matched_sites(model)
        if problem is not None and require_lora_match:
            raise ConfigError(
                problem,
                where="build_lora_mitigator",
                fix="attach a LoRA adapter to linear layers (peft), or pass `require_lora_match=False` "
                "to go on without protection",
            )
        if problem is not None:
            return LoRAMitigator(model, [], None, config, reason=problem)
    metric = None
    if config.task_metric == "fisher_diagonal":
        if finetune is None:
            raise ConfigError(
                "`task_metric: fisher_diagonal` needs fine-tuning data, and there is none",
                where="AlignGuardConfig.task_metric",
                fix="give `finetune` (in the pipeline: fine_tune_dataloader and fine_tune_loss_fn)",
            )
        metric = fisher_mass(
            model, sites, finetune, batches=config.metric_batches, chunk_size=config.chunk_size
        )
    directions = safety_directions(
        model,
        sites,
        safety,
        rank=config.rank or rank or DEFAULT_RANK,
        width=config.width,
        chunk_size=config.chunk_size,
        seed=config.seed,
    )
    return LoRAMitigator(model, sites, directions, config, metric=metric)
