"""What a model must be before anything is measured on it: whole, finite, causal, with room for its rows.

A model that is not would run, and be judged, and the verdict would be about noise: it is refused here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from arisk.base.errors import InputError, NumericsError

__all__ = [
    "require_causal",
    "require_finite",
    "require_room",
    "require_whole",
    "require_whole_adapter",
]

#: Keys that an error names before it counts the rest.
NAMED = 6
#: Tokens of the row that the causality test reads at most.
PROBED = 32
#: Change of earlier logits, relative to the largest, that rounding may make of a causal model.
ROUNDING = 1e-4
#: What to do where quantised weights cannot be multiplied.
BITS_DO_NOT_FIT = (
    "few bits may not fit the widths of this model on this device: leave out `model.quantization`"
    ", or use a GPU"
)
#: Dtypes in which weights are computed with; quantised ones hold codes.
WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Ends of the names of learned tables of positions; other models compute their positions.
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")


def _listed(keys: Collection[str]) -> str:
    """A few of the keys, sorted, and how many more there are."""
    some = sorted(keys)[:NAMED]
    more = len(keys) - len(some)
    return ", ".join(some) + (f" and {more} more" if more else "")


def require_whole(info: Mapping[str, Any], model: nn.Module, where: str) -> list[str]:
    """Refuse weights that are not all there: what is missing would be filled at random.

    Tied weights, and buffers that the model derives, are no part of a weight file and not missed.

    Args:
        info: what `from_pretrained` says of loading: `missing_keys`, `unexpected_keys`, `mismatched_keys`.
        model: the loaded model.
        where: the model's path, for messages.

    Returns:
        Sentences about tensors in the files that this model has no use for.

    Raises:
        InputError: weights are missing, of another shape, or of layers that the model does not have.
    """
    fix = "give the whole folder that save_pretrained wrote, with the config.json of these very weights"
    missing = [str(key) for key in info.get("missing_keys") or ()]
    if missing:
        raise InputError(
            f"{len(missing)} of the model's weights are not in its files: {_listed(missing)}",
            where=where,
            fix=fix,
        )
    mismatched = [_shapes(entry) for entry in info.get("mismatched_keys") or ()]
    if mismatched:
        raise InputError(
            f"{len(mismatched)} weights have another shape than config.json says: {_listed(mismatched)}",
            where=where,
            fix=_resized(info["mismatched_keys"]) or fix,
        )
    unexpected = [str(key) for key in info.get("unexpected_keys") or ()]
    kinds = {_kind(name) for name in model.state_dict()}
    layers = [key for key in unexpected if _kind(key) in kinds]
    if layers:
        raise InputError(
            f"{len(layers)} weights in the files belong to layers that config.json does not have: "
            f"{_listed(layers)}",
            where=where,
            fix=fix,
        )
    if not unexpected:
        return []
    return [f"{len(unexpected)} tensors in the files are no part of this model: {_listed(unexpected)}."]


def _shapes(entry: Any) -> str:
    """A mismatched key with both shapes, as far as they are told."""
    if isinstance(entry, str):
        return entry
    name, *shapes = entry
    sizes = [str(tuple(shape)) for shape in shapes]
    return f"{name} ({' in the file, '.join(sizes)} in the model)" if len(sizes) == 2 else str(name)


def _resized(entries: Collection[Any]) -> str | None:
    """What to do where the vocabulary alone differs; None where more does."""
    sizes: set[int] = set()
    for entry in entries:
        if isinstance(entry, str) or len(entry) != 3 or tuple(entry[1])[1:] != tuple(entry[2])[1:]:
            return None
        if not re.search(r"embed|wte|lm_head|word_embeddings|output", str(entry[0])):
            return None
        sizes.add(int(entry[1][0]))
    if len(sizes) != 1:
        return None
    return f"the vocabulary was resized: set `vocab_size` in config.json to {sizes.pop()}, as in the weights"


def _kind(name: str) -> str:
    """A parameter's name without the numbers of layers."""
    return re.sub(r"\d+", "#", name)


def require_whole_adapter(
    expected: Collection[str], found: Collection[str], own: Collection[str], where: str
) -> None:
    """Refuse an adapter of which keys are missing, or whose keys fit no module.

    Args:
        expected: keys of the adapter's weights as the attached adapter has them.
        found: keys in its files.
        own: names of all weights of the model with the adapter, which a file may hold as well.
        where: the adapter's path, for messages.

    Raises:
        InputError: lists them.
    """
    fix = "give the folder that save_pretrained of the adapter wrote, for this very base model"
    missing = set(expected) - set(found)
    if missing:
        raise InputError(
            f"{len(missing)} of the adapter's {len(expected)} weights are not in its file: "
            f"{_listed(missing)}",
            where=where,
            fix=fix,
        )
    foreign = set(found) - set(expected) - set(own)
    if foreign:
        raise InputError(
            f"{len(foreign)} weights of the adapter fit no module of the model: {_listed(foreign)}",
            where=where,
            fix=fix,
        )


def require_finite(model: nn.Module, where: str) -> None:
    """Refuse weights that are NaN or infinite, as those of a run that diverged.

    Raises:
        NumericsError: names them.
    """
    bad = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dtype in WIDE and parameter.numel() and not parameter.is_meta
        # Both ends in one read; either is NaN where any entry is.
        if not all(bool(end.isfinite()) for end in parameter.detach().aminmax())
    ]
    if bad:
        raise NumericsError(
            f"{len(bad)} tensors of the model hold NaN or infinite weights: {_listed(bad)}",
            where=where,
            fix="give a checkpoint from before it diverged, or a wider `model.dtype` where it overflows",
        )


def require_causal(model: nn.Module, tokens: Sequence[int], where: str) -> None:
    """Refuse a model whose earlier logits move when the last token changes.

    Args:
        model: the model.
        tokens: token ids of a row.
        where: the model's path, for messages.

    Raises:
        InputError: it cannot be run, or looks ahead, so that no loss of it is the likelihood of a text.
        NumericsError: its logits are NaN.
    """
    row = list(tokens[:PROBED])
    if len(row) < 2:
        return
    other = next((t for t in tokens if t != row[-1]), 0 if row[-1] else 1)
    device = next(model.parameters()).device
    batch = torch.tensor([row, [*row[:-1], other]], device=device)
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[:, :-1].float()
    except Exception as err:
        lines = str(err).strip().splitlines()
        raise InputError(
            f"the model cannot be run on a row: {lines[0][:300] if lines else type(err).__name__}",
            where=where,
            fix=BITS_DO_NOT_FIT
            if getattr(model, "is_quantized", False)
            else "see that config.json, weights and tokenizer belong together, and that transformers runs it",
        ) from err
    finally:
        model.train(mode)
    if bool(logits.isnan().any()):
        raise NumericsError(
            "the model's logits are NaN for a row",
            where=where,
            fix="see that config.json belongs to these weights (positions, scales, norms), or give a wider "
            "`model.dtype` where it overflows",
        )
    change, size = float((logits[0] - logits[1]).abs().max()), float(logits.abs().max())
    rounding = max(ROUNDING, *(4 * torch.finfo(p.dtype).eps for p in model.parameters() if p.dtype in WIDE))
    if change > rounding * size:
        raise InputError(
            "the model is not causal: a later token changes what it says of earlier ones",
            where=where,
            fix="give a causal language model (decoder-only); encoders and masked models cannot be forecast",
        )


def require_room(model: Any, longest: Mapping[str, int], largest: Mapping[str, int], where: str) -> list[str]:
    """Refuse rows that the model has no embedding or position for.

    Args:
        model: the loaded causal LM.
        longest: tokens of the longest row, by data set.
        largest: largest token id, by data set.
        where: the model's path, for messages.

    Returns:
        Sentences about rows longer than the model was made for, where its positions are computed.

    Raises:
        InputError: a token has no row in the embedding, or a row more tokens than the table of positions.
    """
    table = model.get_input_embeddings()
    rows = int(table.weight.shape[0]) if getattr(table, "weight", None) is not None else None
    section, token = max(largest.items(), key=lambda item: item[1])
    if rows is not None and token >= rows:
        raise InputError(
            f"the tokenizer gives token {token}, and the model's embedding has {rows} rows",
            where=f"{where}, data set {section}",
            fix="give the tokenizer that belongs to the model, or a model whose embedding was resized to it",
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return []
    beyond = {name: count for name, count in longest.items() if count > limit}
    if not beyond:
        return []
    name, count = max(beyond.items(), key=lambda item: item[1])
    learned = any(module.endswith(POSITION_TABLES) for module, _ in model.named_modules())
    if learned:
        raise InputError(
            f"a row of {count} tokens is longer than the model's {limit} positions",
            where=f"{where}, data set {name}",
            fix=f"set `{name}.max_length: {limit}` or less",
        )
    return [
        f"{name}: rows of up to {count} tokens are longer than the {limit} positions the model is made for."
    ]
