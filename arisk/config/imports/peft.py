"""peft's `adapter_config.json`: the settings of one adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arisk.base.errors import ConfigError
from arisk.config.imports.account import Account, Rule, idle, number, other, taken, text, truth, whole
from arisk.config.plan import AdapterConfig

__all__ = ["read_adapter", "recognise_adapter"]

#: Keys with a setting of their own name.
OWN = [name for name in AdapterConfig.model_fields if name not in ("path", "peft", "r", "alpha", "dropout")]
#: Further keys of `LoraConfig` that change what trains, passed on as they are.
FURTHER = (
    *("fan_in_fan_out", "layers_pattern", "trainable_token_indices", "layer_replication", "lora_bias"),
    *(
        "ensure_weight_tying",
        "alora_invocation_tokens",
        "use_qalora",
        "arrow_config",
        "use_bdlora",
        "kasa_config",
    ),
    *("velora_config", "monteclora_config", "megatron_config"),
)
TABLE: dict[str, Rule] = {
    "r": taken("model.adapter.r", whole),
    "lora_alpha": taken("model.adapter.alpha", number),
    "lora_dropout": taken("model.adapter.dropout", number),
    "base_model_name_or_path": taken("model.path", text),
    "revision": taken("model.revision", text),
    "use_rslora": taken("model.adapter.use_rslora", truth),
    "use_dora": taken("model.adapter.use_dora", truth),
    "peft_type": idle("a LoRA adapter"),
    "task_type": idle("a causal language model, always"),
    "peft_version": idle("who wrote the file"),
    "auto_mapping": idle("how the file is read"),
    "inference_mode": idle("it was saved for use; the plan trains it"),
    "runtime_config": idle("speed and memory"),
    "megatron_core": idle("it belongs to `megatron_config`"),
    "qalora_group_size": idle("it belongs to `use_qalora`"),
    "loftq_config": other("the adapter starts from the rounding error of quantised weights"),
    "eva_config": other("the adapter starts from directions in the data"),
    "corda_config": other("the adapter starts from directions in the data"),
    "lora_ga_config": other("the adapter starts from gradients of the data"),
}


def recognise_adapter(mapping: Mapping[str, Any]) -> bool:
    """Whether this is the config of a peft adapter."""
    return "peft_type" in mapping


def read_adapter(account: Account) -> str:
    """Read the settings of a LoRA adapter.

    Returns:
        What the file is.

    Raises:
        ConfigError: it is another kind of adapter, or a value is wrong.
    """
    kind = str(account.raw("peft_type"))
    if kind != "LORA":
        raise ConfigError(
            f"this is an adapter of kind {kind}, and arisk plans LoRA adapters",
            where=account.source.place("peft_type"),
            fix="train it in Python and give the model to `arisk.Task`, with the names of its parameters",
        )
    account.apply(TABLE)
    further: dict[str, Any] = {}
    for key, value in account.source.mapping.items():
        if key in account.seen:
            continue
        if value in (None, False, [], {}, "none", ""):
            account.note(key, "idle", "not set")
        elif key in OWN:
            account.take(key, f"model.adapter.{key}", value)
        elif key in FURTHER:
            further[key] = value
            account.note(key, "taken", f"model.adapter.peft.{key}, as it is")
    if further:
        account.put("model.adapter.peft", further, account.source.name)
    return "peft adapter"
