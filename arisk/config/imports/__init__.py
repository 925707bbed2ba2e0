"""Configs of other tools as a plan: `arisk init --from FILE`.

`FAMILIES` is the table of the kinds of file that are read, each with what recognises it and what reads it.
Every line of a file is accounted for (`arisk.config.imports.account`). No torch, and nothing of the tools
themselves: a file is data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from arisk.base.errors import ConfigError
from arisk.config.imports.account import Account, Import, Line, Source
from arisk.config.imports.axolotl import read_axolotl, recognise_axolotl
from arisk.config.imports.llama_factory import read_llama_factory, recognise_llama_factory
from arisk.config.imports.peft import read_adapter, recognise_adapter
from arisk.config.imports.torchtune import read_torchtune, recognise_torchtune
from arisk.config.imports.trainer import read_trainer, recognise_trainer
from arisk.config.yaml import read_text, read_yaml, shortened

__all__ = ["FAMILIES", "Family", "Import", "Line", "import_files", "nested"]


class Family(NamedTuple):
    """A kind of file.

    Attributes:
        name: for people.
        recognise: whether a mapping is one; the first of the table that says so reads it.
        read: fills the account, and says what exactly the file is.
    """

    name: str
    recognise: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Account], str]


#: All kinds, those with keys of their own first.
FAMILIES = (
    Family("adapter_config.json of peft", recognise_adapter, read_adapter),
    Family("torchtune", recognise_torchtune, read_torchtune),
    Family("axolotl", recognise_axolotl, read_axolotl),
    Family("LLaMA-Factory", recognise_llama_factory, read_llama_factory),
    Family("TrainingArguments, SFTConfig, TRL's YAML, alignment handbook", recognise_trainer, read_trainer),
)
#: Files that are no settings, by the end of their name, and what to give in their place.
NO_CONFIG = {
    ".bin": "a pickle, which runs code when it is read",
    ".pt": "a pickle, which runs code when it is read",
    ".pth": "a pickle, which runs code when it is read",
    ".pkl": "a pickle, which runs code when it is read",
    ".ckpt": "a pickle, which runs code when it is read",
    ".safetensors": "a file of weights",
    ".gguf": "a file of weights",
    ".py": "a script, whose arguments only running it would tell",
    ".ipynb": "a notebook, whose arguments only running it would tell",
    ".sh": "a script, whose arguments only running it would tell",
    ".jsonl": "a file of rows",
    ".parquet": "a file of rows",
}
AS_JSON = (
    "in the script that has the arguments: "
    "`pathlib.Path('training_args.json').write_text(training_args.to_json_string())`, and give that file"
)
#: A key that says what a mapping is that is no training config.
OTHERS = {
    "architectures": "the config of a model; give its folder as `--model`",
    "log_history": "a trainer's state; give its arguments as JSON",
    "zero_optimization": "a config of DeepSpeed; give the file of the run that names it",
    "compute_environment": "a config of accelerate; give the file of the run, and `--devices N`",
    "safety": "a config of arisk already",
}


def import_files(paths: Sequence[Path], *, devices: int = 1) -> Import:
    """Read the configs of one run.

    Args:
        paths: the files, in any order; a folder with an adapter_config.json stands for that.
        devices: processes that train side by side.

    Returns:
        The plan as dotted keys, and the account of every line.

    Raises:
        ConfigError: a file is no config of a kind that is known, or two contradict each other.
    """
    found = Import(devices=devices)
    for path in paths:
        source = _source(path)
        family = next((each for each in FAMILIES if each.recognise(source.mapping)), None)
        if family is None:
            raise _unknown(source)
        account = Account(source, found)
        found.kinds.append(family.read(account))
        account.rest()
    return found


def _unknown(source: Source) -> ConfigError:
    for key, what in OTHERS.items():
        if key in source.mapping:
            said, _, fix = what.partition("; ")
            return ConfigError(f"this is {said}", where=source.name, fix=fix or "edit it as it is")
    keys = shortened(", ".join(map(str, source.mapping)) or "none", 120)
    return ConfigError(
        f"this is no training config that arisk knows (its keys: {keys})",
        where=source.name,
        fix=f"give one of {'; '.join(family.name for family in FAMILIES)}",
    )


def _source(path: Path) -> Source:
    """A file as a mapping with the lines of its keys."""
    if path.is_dir() and (path / "adapter_config.json").is_file():
        path = path / "adapter_config.json"
    kind = NO_CONFIG.get(path.suffix.lower())
    if kind is None and path.is_file():
        with path.open("rb") as file:
            start = file.read(4)
        if start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            kind = NO_CONFIG[".bin"]
    if kind is not None:
        raise ConfigError(f"this is {kind}, and no config", where=str(path), fix=AS_JSON)
    text = read_text(path, "config file")
    name = str(path)
    fix = "correct that line, or write the file anew with the tool it is of"
    if path.suffix.lower() == ".json":
        value = _json(text, name)
        node = _lines_of(text)
    else:
        value, node = read_yaml(text, name, fix=fix)
    if not isinstance(value, dict):
        what = "empty" if value is None else f"a {type(value).__name__}, no mapping of keys"
        raise ConfigError(
            f"the file is {what}", where=name, fix="give a file with keys such as `learning_rate`"
        )
    return Source(name, _plain(value), dict(_numbered(node, "")))


def _plain(value: Any) -> Any:
    """The value with text for all that JSON does not have, such as dates, bytes and keys that are numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _json(text: str, name: str) -> Any:
    """The value of a JSON text.

    Raises:
        ConfigError: it is none, with the line.
    """
    fix = "correct that line, or write the file anew with `to_json_string()`"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
            raise ConfigError(f"the key {shortened(twice)!r} is given twice", where=name, fix=fix)
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as err:
        raise ConfigError(
            f"this is not valid JSON: {err.msg}", where=f"{name}, line {err.lineno}", fix=fix
        ) from err
    except (ValueError, RecursionError) as err:
        what = "nested too deep" if isinstance(err, RecursionError) else shortened(str(err))
        raise ConfigError(f"this JSON cannot be read: {what}", where=name, fix=fix) from err


def _lines_of(text: str) -> yaml.Node | None:
    """The nodes of a JSON text read as YAML, for their lines alone; None where it is no YAML as well."""
    try:
        return read_yaml(text, "", fix="")[1]
    except ConfigError:
        return None


def _numbered(node: yaml.Node | None, prefix: str) -> Iterator[tuple[str, int]]:
    """Dotted key and line of every key below a node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield f"{prefix}{key.value}", key.start_mark.line + 1
                yield from _numbered(value, f"{prefix}{key.value}.")


def nested(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as sections; what is set for `finetune` as a whole goes into each of its data sets."""
    found: dict[str, Any] = {}
    sets = plan.get("finetune")
    several = [dict(each) for each in (sets if isinstance(sets, list) else [sets])] if sets else [{}]
    for key, value in plan.items():
        section, _, inner = key.partition(".")
        if section == "finetune":
            if inner:
                for each in several:
                    each.setdefault(inner, value)
            continue
        place = found
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    if several != [{}]:
        found["finetune"] = several if len(several) > 1 else several[0]
    return found
