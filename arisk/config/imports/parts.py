"""What the families share: steps, warm-up, schedule, optimizer, precision, LoRA, quantisation, data sets.

Each function reads keys that depend on each other, under the names that a family gives them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from arisk.base.errors import ConfigError
from arisk.config.imports.account import Account, mapping_of, number, text, truth, whole
from arisk.config.names import OPTIMIZERS, SCHEDULES

__all__ = [
    "DTYPES",
    "add_sets",
    "betas",
    "carried_out",
    "lora",
    "optimizer",
    "packing",
    "precision",
    "quantization",
    "refuse",
    "rows_per_step",
    "schedule",
    "steps",
    "template",
    "warmup",
]

#: Names of dtypes in configs → arisk's.
DTYPES = {
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "float16", "half", "torch.float16"), "float16"),
    **dict.fromkeys(("fp32", "float32", "float", "torch.float32"), "float32"),
}
#: Old and new names of one optimizer.
SAME_OPTIMIZER = {"adamw_hf": "adamw_torch", "paged_adamw": "paged_adamw_32bit"}
#: What of an optimizer's name is left out when it is carried out.
CARRIED_OUT = {
    "galore": "carried out without GaLore's projection of the gradients",
    "8bit": "carried out in full precision: states of few bits round each step",
    "4bit": "carried out in full precision: states of few bits round each step",
    "paged": "it pages only where its state lies",
}


def carried_out(name: str) -> str:
    """What is not carried out as an optimizer's name says; empty where all is."""
    return next((how for part, how in CARRIED_OUT.items() if part in name), "")


def refuse(account: Account, key: str, what: str) -> None:
    """Refuse a file that plans no supervised fine-tune.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"this file plans {what}, and arisk forecasts supervised fine-tuning",
        where=account.source.place(key),
        fix="import the config of the supervised stage; fine-tuning on the chosen answers is another run",
    )


def steps(account: Account, *, epochs: str, most: str, default_epochs: float) -> None:
    """Epochs or steps: a positive number of steps decides, as in transformers' Trainer."""
    limit = account.read(most, whole)
    passes = account.read(epochs, number)
    if limit is not None and limit > 0:
        account.take(most, "training.max_steps", limit)
        if passes is not None:
            account.note(epochs, "idle", f"`{most}` decides")
        return
    if limit is not None:
        account.note(most, "idle", "not set: epochs decide")
    if passes is not None:
        account.take(epochs, "training.epochs", passes)
    elif "training.max_steps" not in account.into.plan:
        account.assume("training.epochs", default_epochs, "its default")


def rows_per_step(account: Account, *, batch: str, accumulation: str, default_batch: int) -> None:
    """Rows of a micro-batch, and micro-batches of a step over all devices."""
    size = account.read(batch, whole)
    if size is not None:
        account.take(batch, "training.batch_size", size)
    else:
        account.assume("training.batch_size", default_batch, "its default")
    devices = account.into.devices
    micro = account.read(accumulation, whole)
    many = f"{micro or 1} on each of {devices} devices"
    if micro is not None and devices > 1:
        account.take(
            accumulation, "training.gradient_accumulation", micro * devices, note=many, computed=True
        )
    elif micro is not None:
        account.take(accumulation, "training.gradient_accumulation", micro)
    elif devices > 1:
        account.assume("training.gradient_accumulation", devices, many)


def warmup(account: Account, *, count: str, ratio: str) -> None:
    """Warm-up: a number of steps wins over a share; a number below 1 is a share, as in transformers 5."""
    given = account.read(count, number)
    share = account.read(ratio, number)
    if given and given >= 1:
        account.take(count, "training.warmup_steps", int(given))
        if share is not None:
            account.note(ratio, "idle", f"`{count}` decides")
        return
    key = count if given else ratio
    if given is not None and key != count:
        account.note(count, "idle", "none: the share decides" if share else "no warm-up")
    if share is not None and key != ratio:
        account.note(ratio, "idle", f"`{count}` decides")
    value = given or share
    if value:
        most = account.into.plan.get("training.max_steps")
        said = f"{math.ceil(value * most)} of {most} steps" if most else "rounded up to whole steps"
        account.take(key, "training.warmup_ratio", value, note=said, computed=True)
    elif share is not None:
        account.note(ratio, "idle", "no warm-up")


def schedule(account: Account, *, name: str, arguments: str, default: str) -> None:
    """The schedule and its arguments."""
    given = account.read(name, text)
    if given is None:
        account.assume("training.schedule", default, "its default")
    elif given in SCHEDULES:
        account.take(name, "training.schedule", given)
    else:
        account.put("training.schedule", default, account.source.place(name))
        account.note(
            name,
            "other",
            f"arisk cannot follow {given!r} and plans `{default}`: how far each step moves differs",
        )
    extra = account.read(arguments, mapping_of)
    if extra:
        account.take(arguments, "training.schedule_args", extra)


def optimizer(account: Account, *, name: str, arguments: str, default: str) -> None:
    """The optimizer by the trainer's name, and its further arguments."""
    given = account.read(name, text)
    if given is None:
        account.assume("training.optimizer", default, "its default")
    elif (plain := _optimizer_name(given)) in OPTIMIZERS:
        account.take(name, "training.optimizer", plain, note=carried_out(plain))
    else:
        account.put("training.optimizer", "adamw", account.source.place(name))
        account.note(
            name,
            "other",
            f"arisk cannot carry out {given!r} and plans adamw: direction and length of every step differ",
        )
    extra = account.read(arguments, mapping_of)
    if extra:
        account.take(arguments, "training.optimizer_args", extra)


def _optimizer_name(given: str) -> str:
    name = given.removeprefix("OptimizerNames.").lower()
    return SAME_OPTIMIZER.get(name, name)


def betas(account: Account, *, first: str, second: str) -> None:
    """Both moment decays, of which a file may name one."""
    given = [account.read(first, number), account.read(second, number)]
    if any(value is not None for value in given):
        pair = [0.9 if given[0] is None else given[0], 0.999 if given[1] is None else given[1]]
        for key, value in zip((first, second), given, strict=True):
            if value is not None:
                account.take(key, "training.betas", pair)


def precision(account: Account, *, bf16: str, fp16: str, default: str = "weights") -> str:
    """Autocast of the planned training.

    Returns:
        `bf16`, `fp16` or `weights`.
    """
    wanted = {"bf16": bf16, "fp16": fp16}
    on = [kind for kind, key in wanted.items() if str(account.raw(key)).lower() in {"true", "auto", "full"}]
    kind = on[0] if on else default if all(account.raw(key) is None for key in wanted.values()) else "weights"
    for each, key in wanted.items():
        if account.raw(key) is None:
            continue
        if each == kind:
            account.take(key, "training.precision", kind)
        else:
            account.note(key, "idle", "switched off")
    if not on and kind != "weights":
        account.assume("training.precision", kind, "its default")
    return kind


def quantization(
    account: Account, *, four: str, eight: str, options: Mapping[str, str], default_kind: str = "nf4"
) -> bool:
    """4-bit and 8-bit weights.

    Args:
        account: the file.
        four: key that switches 4 bits on.
        eight: key that switches 8 bits on.
        options: further keys → arguments of BitsAndBytesConfig.
        default_kind: kind of 4-bit number where none is named.

    Returns:
        Whether weights are quantised.
    """
    bits = {4: account.read(four, truth), 8: account.read(eight, truth)}
    if not any(bits.values()):
        account.idle((four, eight, *options), "weights are not quantised")
        return False
    key = four if bits[4] else eight
    arguments: dict[str, Any] = {"load_in_4bit" if bits[4] else "load_in_8bit": True}
    if bits[4]:
        arguments["bnb_4bit_quant_type"] = default_kind
        arguments["bnb_4bit_compute_dtype"] = account.into.plan.get("model.dtype", "float32")
    for option, name in options.items():
        if account.raw(option) is not None and bits[4]:
            arguments[name] = account.raw(option)
            account.note(option, "taken", f"model.quantization.{name}")
    account.take(key, "model.quantization", arguments)
    account.idle((four, eight, *options), "switched off")
    return True


def lora(account: Account, keys: Mapping[str, tuple[str, Any]]) -> None:
    """Settings of a new adapter.

    Args:
        account: the file.
        keys: key of the file → (setting below `model.adapter`, how it is read).
    """
    for key, (name, read) in keys.items():
        value = account.read(key, read)
        if value is None or value in ([], {}):
            continue
        account.take(key, f"model.adapter.{name}", value)


def template(account: Account, key: str, tool: str) -> None:
    """A template by the tool's own name, where arisk takes the tokenizer's."""
    given = account.raw(key)
    if given in (None, "tokenizer_default"):
        account.idle([key], "the tokenizer's own")
    else:
        account.note(
            key,
            "other",
            f"{tool}'s template {given!r} writes the rows, and here the tokenizer's own: the same tokens "
            "only if the two agree",
        )


def packing(account: Account, key: str, *, kind: str = "bfd", differs: str = "") -> None:
    """Packing, which puts several rows into one sequence.

    Args:
        account: the file.
        key: what switches it on.
        kind: arisk's packing that is meant.
        differs: what is done in another way than there.
    """
    on = account.read(key, truth)
    if on:
        account.take(key, "training.packing", kind)
        if differs:
            account.note(key, "other", differs)
    elif on is False:
        account.note(key, "idle", "switched off")


def add_sets(account: Account, key: str, sets: Sequence[Mapping[str, Any]]) -> None:
    """Put the fine-tuning data sets into the plan; one is a mapping, several are a list."""
    value = dict(sets[0]) if len(sets) == 1 else [dict(each) for each in sets]
    account.put("finetune", value, account.source.place(key))
