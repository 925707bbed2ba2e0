"""The stage graph: what each stage reads, in which order, and what its key depends on. Data only."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STAGES", "StageSpec"]


@dataclass(frozen=True)
class StageSpec:
    """One stage of the graph.

    Attributes:
        name: the stage.
        version: raised whenever the stage's numbers change.
        upstream: stages whose outputs it reads.
        config: dotted config values it depends on. Device and threads are none: numbers do not
            depend on them beyond rounding.
        inputs: fingerprints it depends on.
        shows: optional stages whose outputs it includes where they are fresh.
        optional: run only when asked for by name.
        reach: dotted config value that says how far the stage goes. A stored stage belongs to the
            plan whatever its reach; only who asks for the stage by name insists on one.
    """

    name: str
    version: int
    upstream: tuple[str, ...]
    config: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()
    optional: bool = False
    reach: str | None = None


#: Settings of collect that change its numbers or files; its budgets do not.
COLLECT_KEYS = ("engine", "fisher", "store", "store_dtype", "chunk_size")

#: Settings of guard that change its numbers; its limits only change the recommendation.
GUARD_KEYS = (
    *("methods", "steps", "alignguard", "ewc", "projection", "replay", "task", "task_samples"),
    *("calibration_steps", "control_samples", "generate", "max_new_tokens"),
)

#: Settings of behaviour that decide what is followed and written, and those that only label it.
BEHAVIOUR_KEYS = tuple(
    f"behaviour.{key}" for key in ("prompts", "ordinary_prompts", "tokens", "opening_tokens")
)
JUDGE_KEYS = ("behaviour.judge", "behaviour.refusal_openings")

#: The stage graph in order. The rollout alone depends on the whole planned training.
STAGES = (
    StageSpec(
        "collect",
        4,
        (),
        (*("model", "safety"), *(f"collect.{key}" for key in COLLECT_KEYS)),
        ("model", "adapter", "safety"),
    ),
    StageSpec("subspace", 2, ("collect",), ("subspace",)),
    StageSpec(
        "score",
        3,
        ("collect", "subspace"),
        (
            "finetune",
            "control",
            "score",
            "training.optimizer",
            "training.betas",
            "training.eps",
            "training.batch_size",
            "training.gradient_accumulation",
            "training.weight_decay",
        ),
        ("finetune", "control"),
    ),
    StageSpec(
        "rollout",
        4,
        (),
        ("model", "safety", "finetune", "control", "training", "rollout", *BEHAVIOUR_KEYS),
        ("model", "adapter", "safety", "finetune", "control"),
    ),
    StageSpec("forecast", 6, ("collect", "score", "rollout"), ("training", "forecast", *JUDGE_KEYS)),
    # The truth depends on the plan alone: another threshold or another judge needs no new fine-tune.
    StageSpec(
        "verify",
        3,
        (),
        (
            *("model", "safety", "finetune", "control", "training", "verify.safety", "verify.steps"),
            *("verify.control_samples", *BEHAVIOUR_KEYS),
        ),
        ("model", "adapter", "safety", "finetune", "control", "verify.safety"),
        optional=True,
        reach="verify.steps",
    ),
    StageSpec(
        "screen",
        5,
        (),
        ("model", "safety", "finetune", "control", "training", "rollout", "screen"),
        ("model", "adapter", "safety", "finetune", "control"),
        optional=True,
    ),
    StageSpec(
        "guard",
        3,
        (),
        (
            *("model", "safety", "finetune", "control", "training", "verify.safety"),
            *(f"guard.{key}" for key in GUARD_KEYS),
        ),
        ("model", "adapter", "safety", "finetune", "control", "verify.safety", "guard.task"),
        optional=True,
        reach="guard.steps",
    ),
    StageSpec(
        "report",
        10,
        ("collect", "subspace", "score", "rollout", "forecast"),
        ("report", *JUDGE_KEYS, "guard.tolerated_task_loss", "guard.wanted_drift"),
        shows=("verify", "screen", "guard"),
    ),
)
