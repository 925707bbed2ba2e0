"""Names in a plan: of optimizers and schedules, and those of transformers, TRL and peft for its settings.

What an optimizer or a schedule is stands in the tables of `arisk.training`, which hold these names and add
to them; the names alone are here so that a misspelt one is told with all other mistakes of a config, before
anything heavy is loaded. A setting given under two names (`num_train_epochs` is `epochs`) must have one
value.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, TypeVar

__all__ = [
    "ALIASES",
    "METHODS",
    "OPTIMIZERS",
    "SCHEDULES",
    "Alias",
    "Table",
    "canonical",
    "known_method",
    "known_optimizer",
    "known_schedule",
    "same_setting",
]

Entry = TypeVar("Entry")

#: Names of optimizers: arisk's own, and transformers' `optim` where they mean one of them.
OPTIMIZERS = [
    *("adamw", "sgd", "adafactor", "lion", "muon", "rmsprop"),
    *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "lion_32bit"),
    *("paged_adamw_32bit", "paged_lion_32bit", "adamw_bnb_8bit", "adamw_8bit", "adamw_torch_8bit"),
    *("adamw_torch_4bit", "paged_adamw_8bit", "lion_8bit", "paged_lion_8bit", "galore_adamw"),
    *("galore_adamw_8bit", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise"),
    *("galore_adafactor", "galore_adafactor_layerwise"),
]

#: Names of schedules, those of transformers' `lr_scheduler_type`.
SCHEDULES = [
    *("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts"),
    *("cosine_with_min_lr", "cosine_warmup_with_min_lr", "polynomial", "inverse_sqrt"),
    "warmup_stable_decay",
]
#: Names of the methods that `arisk guard` compares.
METHODS = [
    *("plain", "alignguard", "ewc", "projection", "replay", "constrained", "kl", "own_replay"),
    *("drift_replay", "smaller", "average", "alpha"),
]
#: Names of the ways to estimate a row's score before the exact ones.
ROW_SCORES = ["differences", "first_tokens", "sketch"]
#: Schedules of transformers that no plan can tell beforehand.
MEASURED = ("reduce_lr_on_plateau", "greedy")


class Table(MutableMapping[str, Entry]):
    """A table by name whose further entries are known to configs as well.

    Args:
        names: the list of names that configs are held against.
        entries: what they are.
    """

    def __init__(self, names: list[str], entries: dict[str, Entry]) -> None:
        self._names, self._entries = names, dict(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __setitem__(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry
        if name not in self._names:
            self._names.append(name)

    def __delitem__(self, name: str) -> None:
        del self._entries[name]
        self._names.remove(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def known_optimizer(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: it is none.
    """
    return _known(name, OPTIMIZERS, "an optimizer")


def known_schedule(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: it is none, or the schedule follows losses that no plan can tell.
    """
    if name in MEASURED:
        raise ValueError(
            f"`{name}` follows losses that are measured on the way, so no plan can tell it: give the "
            "schedule you expect, such as `constant` or `linear`"
        )
    return _known(name, SCHEDULES, "a schedule")


def known_method(name: str) -> str:
    """The name, if it is one.

    Raises:
        ValueError: it is none.
    """
    return _known(name, METHODS, "a method of protection")


def known_row_score(name: str) -> str:
    """The name, if it is one; `auto` and `exact` are none of the table and always known.

    Raises:
        ValueError: it is none.
    """
    return _known(name, ["auto", "exact", *ROW_SCORES], "a way to score rows")


def _known(name: str, names: list[str], what: str) -> str:
    if name in names:
        return name
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(names)}"
    raise ValueError(f"'{name}' is not the name of {what}; {meant}")


class Alias(NamedTuple):
    """A foreign name of a setting.

    Attributes:
        key: arisk's name.
        read: value under the foreign name → value of the setting; `UNSAID` where it says nothing.
    """

    key: str
    read: Callable[[Any], Any] = lambda value: value


#: What a foreign name reads as when it leaves the setting open, as `bf16: false` does.
UNSAID = object()


def _switch(kind: str) -> Callable[[Any], Any]:
    """`bf16: true` as `precision: bf16`."""
    return lambda value: kind if value is True or str(value).lower() in ("true", "auto") else UNSAID


def _dtype(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, str) else value


def _revision(value: Any) -> Any:
    return UNSAID if value == "main" else value


#: Sections of the config → foreign names in it.
ALIASES: Mapping[str, Mapping[str, Alias]] = {
    "training": {
        "num_train_epochs": Alias("epochs"),
        "per_device_train_batch_size": Alias("batch_size"),
        "gradient_accumulation_steps": Alias("gradient_accumulation"),
        "lr_scheduler_type": Alias("schedule"),
        "lr_scheduler_kwargs": Alias("schedule_args"),
        "optim": Alias("optimizer"),
        "optim_args": Alias("optimizer_args"),
        "adam_epsilon": Alias("eps"),
        "dataloader_drop_last": Alias("drop_last"),
        "bf16": Alias("precision", _switch("bf16")),
        "fp16": Alias("precision", _switch("fp16")),
    },
    "model": {
        "model_name_or_path": Alias("path"),
        "model_revision": Alias("revision", _revision),
        "torch_dtype": Alias("dtype", _dtype),
        "load_in_4bit": Alias("quantization", lambda value: "4bit" if value else UNSAID),
        "load_in_8bit": Alias("quantization", lambda value: "8bit" if value else UNSAID),
    },
    "adapter": {
        "lora_r": Alias("r"),
        "lora_alpha": Alias("alpha"),
        "lora_dropout": Alias("dropout"),
        "lora_target_modules": Alias("target_modules"),
        "lora_modules_to_save": Alias("modules_to_save"),
        "lora_target_parameters": Alias("target_parameters"),
    },
    "data": {
        "dataset_name": Alias("path"),
        "dataset_config": Alias("subset"),
        "max_seq_length": Alias("max_length"),
        "dataset_text_field": Alias("text_column"),
    },
}


def canonical(section: str, value: Any) -> Any:
    """A section under arisk's own names.

    Args:
        section: a key of `ALIASES`.
        value: the section as given; what is no mapping stays as it is.

    Raises:
        ValueError: one setting has two values.
    """
    if not isinstance(value, Mapping):
        return value
    found = {key: each for key, each in value.items() if key not in ALIASES[section]}
    said = {key: key for key in found}
    given = {name: value[name] for name in ALIASES[section] if name in value}
    if section == "training":
        _trainer_values(found)
        _betas(value, found, said)
    for name, each in given.items():
        key, read = ALIASES[section][name]
        translated = read(each)
        if translated is UNSAID:
            continue
        if key in found and found[key] != translated:
            raise ValueError(f"`{said[key]}: {value[said[key]]}` and `{name}: {each}` contradict each other")
        found[key], said[key] = translated, name
    return found


def _trainer_values(found: dict[str, Any]) -> None:
    """Values by which the trainers mean another setting: -1 steps, a share of warm-up steps, packing."""
    if found.get("max_steps") in (-1, "-1"):
        del found["max_steps"]
    strategy = found.pop("packing_strategy", None)
    if found.get("packing") is True:
        found["packing"] = strategy or "bfd"
    warmup = found.get("warmup_steps")
    if isinstance(warmup, float) and 0 < warmup < 1:
        found.setdefault("warmup_ratio", found.pop("warmup_steps"))


def _betas(value: Mapping[str, Any], found: dict[str, Any], said: dict[str, str]) -> None:
    """`adam_beta1` and `adam_beta2` as `betas`."""
    for name in ("adam_beta1", "adam_beta2"):
        found.pop(name, None)
        said.pop(name, None)
    pair = [value.get("adam_beta1"), value.get("adam_beta2")]
    if pair == [None, None]:
        return
    both = [0.9 if pair[0] is None else pair[0], 0.999 if pair[1] is None else pair[1]]
    if "betas" in found and list(found["betas"]) != both:
        raise ValueError(
            f"`betas: {found['betas']}` and `adam_beta1`, `adam_beta2`: {both} contradict each other"
        )
    found["betas"] = both


def same_setting(section: str, key: str) -> set[str]:
    """All names of the setting that a key names, itself among them."""
    table = ALIASES.get(section, {})
    own = table[key].key if key in table else key
    return {own, *(name for name, alias in table.items() if alias.key == own)}
