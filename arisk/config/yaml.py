"""YAML read strictly into `Config`: every mistake at once, each with its place, the given value and a remedy.

What is foreign comes in through here: the config, `--set`, and the files of other tools. Python's, PyYAML's
and pydantic's own exceptions (numbers of thousands of digits, dates that are none, deep nesting, keys that
are lists) become one `ConfigError`, and the work is bounded.

Relative data and model paths are looked up beside the config file first, then in the working directory; a
path found in neither is left as it is (it may be a hub id).

Where a config is asked for, a run directory will do: it keeps its own.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from arisk.base.artifacts import CONFIG_FILE
from arisk.base.errors import ConfigError
from arisk.config.names import ALIASES, same_setting
from arisk.config.plan import Config
from arisk.config.sections import path_fault

__all__ = [
    "config_error",
    "config_file",
    "dump_config",
    "json_schema",
    "known_keys",
    "load_config",
    "models_in",
    "read_text",
    "read_yaml",
    "run_directory",
    "set_value",
    "shortened",
    "validate_mapping",
]

#: Half of a UTF-16 pair: text that no file and no library can take.
HALF = re.compile("[\ud800-\udfff]")
#: Levels of nesting, values and bytes that no file of settings needs.
DEEPEST, MOST_VALUES, LARGEST_FILE = 50, 100_000, 4_000_000


def shortened(text: str, limit: int = 80) -> str:
    """A text on one line, control characters written out, cut where it is longer than `limit` characters."""
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in " ".join(text.split()))
    if len(text) <= limit:
        return text
    return f"{text[: limit * 2 // 3]} … {text[-limit // 4 :]} ({len(text)} characters)"


class _Loader(yaml.SafeLoader):
    """SafeLoader whose every fault has a place, and whose work is bounded.

    It refuses a key given twice (YAML would drop the first silently), keys that are no scalars, deep
    nesting and documents that grow by their aliases.
    """

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node, at most `DEEPEST` levels down."""
        self.depth += 1
        try:
            if self.depth > DEEPEST:
                raise yaml.MarkedYAMLError(
                    problem=f"values are nested more than {DEEPEST} deep",
                    problem_mark=self.peek_event().start_mark,
                )
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """The value of a node; a text that is not what its tag says is an error with its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, OverflowError, KeyError, AttributeError) as err:
            text = shortened(str(node.value)) if isinstance(node, yaml.ScalarNode) else "this value"
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(
                problem=f"{text!r} is no {kind} that can be read", problem_mark=node.start_mark
            ) from err


def _unique_mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                problem="a key must be one word, not a list or a mapping", problem_mark=key_node.start_mark
            )
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # `<<: *defaults`, which may say again what stands here
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.MarkedYAMLError(
                problem=f"the key {shortened(str(key))!r} is given twice", problem_mark=key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)


def _refuse_growth(root: yaml.Node) -> None:
    """Refuse a document that its aliases make endless, too deep, or larger than `MOST_VALUES` values."""
    seen: dict[int, tuple[int, int]] = {}
    above: set[int] = set()

    def measure(node: yaml.Node) -> tuple[int, int]:
        """Values in a node and levels below it, aliases written out."""
        if isinstance(node, yaml.ScalarNode):
            return 1, 0
        if id(node) in above:
            raise yaml.MarkedYAMLError(problem="a value holds itself", problem_mark=node.start_mark)
        if id(node) not in seen:
            above.add(id(node))
            pairs = isinstance(node, yaml.MappingNode)
            children = [part for pair in node.value for part in pair] if pairs else node.value
            inner = [measure(child) for child in children]
            seen[id(node)] = 1 + sum(n for n, _ in inner), 1 + max((deep for _, deep in inner), default=0)
            above.remove(id(node))
        values, levels = seen[id(node)]
        if values > MOST_VALUES or levels > DEEPEST:
            problem = f"its aliases make more than {MOST_VALUES} values of it, or more than {DEEPEST} levels"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return values, levels

    measure(root)


def read_yaml(text: str, where: str, *, fix: str, numbered: bool = True) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text, and the nodes it was made of (they know their lines).

    Args:
        text: what was read.
        where: the file, or the option, for messages.
        fix: remedy of a fault.
        numbered: name the line as well.

    Raises:
        ConfigError: it is no YAML, or not YAML of a sane size and depth; with the line.
    """
    loader: Any = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_growth(node)
        return loader.construct_document(node), node
    except yaml.YAMLError as err:
        mark = getattr(err, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark and numbered else ""
        problem = getattr(err, "problem", None) or getattr(err, "reason", None) or str(err)
        raise ConfigError(
            f"this is not valid YAML: {shortened(problem, 200)}", where=f"{where}{line}", fix=fix
        ) from err
    finally:
        if loader is not None:
            loader.dispose()


def read_text(path: Path, what: str) -> str:
    """The text of a regular file of at most `LARGEST_FILE` bytes.

    Args:
        path: the file.
        what: what it is to be, for messages, such as `config file`.

    Raises:
        ConfigError: it is missing, a folder, a device, too large, or no UTF-8.
    """
    shown = shortened(str(path), 200)
    if fault := path_fault(str(path)):
        where = shown or "(empty)"
        raise ConfigError(f"the {what} cannot be read: {fault}", where=where, fix="check the path")
    try:
        if path.is_dir():
            raise ConfigError(f"this is a folder, not a {what}", where=shown, fix="give the file itself")
        if path.exists() and not path.is_file():
            raise ConfigError(
                f"the {what} is no regular file (a device, a pipe or a socket)",
                where=shown,
                fix="save its text to a file and give that",
            )
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(
                f"the {what} has {path.stat().st_size} bytes, too many for settings",
                where=shown,
                fix=f"give a file of settings; they take less than {LARGEST_FILE} bytes",
            )
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as err:
        raise ConfigError(
            f"the {what} does not exist", where=shown, fix="check the path, or write one with `arisk init`"
        ) from err
    except (OSError, UnicodeDecodeError) as err:
        why = shortened(str(err), 200)
        fix = "give a UTF-8 text file"
        raise ConfigError(f"the {what} cannot be read: {why}", where=shown, fix=fix) from err


Model = TypeVar("Model", bound=BaseModel)

#: Sections of the aliases → the config models that read it.
SECTIONS = {
    "training": ("TrainingConfig",),
    "model": ("ModelConfig",),
    "adapter": ("AdapterConfig",),
    "data": ("DataConfig", "ProbeConfig"),
}
#: Place in the config → section of the aliases.
ALIASED = {
    "training": "training",
    "model": "model",
    "model.adapter": "adapter",
    **dict.fromkeys(("safety", "finetune", "control", "verify.safety", "guard.task"), "data"),
}
#: Stands for any name in a place of the config.
ANY = "*"

#: Config values that are files or folders.
PATHS = (
    ("model", "path"),
    ("model", "model_name_or_path"),
    ("model", "adapter"),
    ("model", "adapter", "path"),
    ("safety", "path"),
    ("finetune", "path"),
    ("control", "path"),
    ("verify", "safety", "path"),
    ("guard", "task", "path"),
    *((section, "dataset_name") for section in ("safety", "finetune", "control")),
    *(("probes", ANY, key) for key in ("path", "dataset_name")),
)


def config_file(path: Path) -> Path:
    """The YAML file that is meant: of a run directory its own config, else the path itself.

    Args:
        path: a YAML file or a run directory.

    Raises:
        ConfigError: it is a folder that holds no run.
    """
    if path_fault(str(path)) or not path.is_dir():
        return path  # whoever reads it says what is wrong
    if (path / CONFIG_FILE).is_file():
        return path / CONFIG_FILE
    what = f"this folder is no run directory: it has no {CONFIG_FILE}"
    fix = "give the YAML file of a plan, or the folder of a run"
    if (path / "manifest.json").exists():
        what, fix = f"this is the stage {path.name} of a run, not a run", f"give {path.parent}"
    raise ConfigError(what, where=shortened(str(path), 200), fix=fix)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, or that of a run directory, and apply `--set` overrides.

    Args:
        path: the YAML file, or a run directory.
        overrides: `dotted.key=value` items; the value is read as YAML.

    Raises:
        ConfigError: the file is missing or no YAML, or keys or values are wrong; all of them are
            listed, the first with the others in `also`.
    """
    path = config_file(path)
    mapping = _read_config(path)
    for item in overrides:
        set_value(mapping, item)
    for keys in PATHS:
        for place in _places(mapping, keys):
            _anchor(*place, path.parent)
    return validate_mapping(Config, mapping, str(path))


def run_directory(config: Config, config_path: Path, given: Path | None) -> Path:
    """The run directory: given, standing for its config, `run.dir`, or `runs/<name of the config>`."""
    if given is None and config_path.is_dir():
        return config_path
    return given or config.run.dir or Path("runs") / config_path.stem


def _read_config(path: Path) -> dict[str, Any]:
    fix = "correct that line; `arisk init` writes a file to compare with"
    mapping, _ = read_yaml(read_text(path, "config file"), str(path), fix=fix)
    if not isinstance(mapping, dict):
        raise ConfigError(
            "the config is empty" if mapping is None else f"the config is a {type(mapping).__name__}",
            where=str(path),
            fix="give sections such as `model:`, `safety:` and `finetune:`; `arisk init` writes them",
        )
    return mapping


def set_value(mapping: dict[str, Any], item: str) -> None:
    """Apply one `dotted.key=value` override in place.

    Raises:
        ConfigError: there is no `=`, the value is not YAML, or the key leads through a value.
    """
    key, equals, text = item.partition("=")
    where = f"--set {shortened(item, 200)}"
    if not equals or not key:
        raise ConfigError(
            "an override needs the form key=value", where=where, fix="e.g. training.max_steps=100"
        )
    value, _ = read_yaml(text, where, fix="quote it", numbered=False)
    *parents, last = key.split(".")
    place: Any = mapping
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise ConfigError(
                f"`{parent}` holds a value, not a section", where=where, fix="set the whole section"
            )
    section = "data" if parents[:1] == ["probes"] else ALIASED.get(".".join(parents), "")
    for name in same_setting(section, last) if section else ():
        place.pop(name, None)  # also under the name of another tool
    place[last] = value


def _places(place: Any, keys: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    """(mapping or list, key or number) of every value under these keys; a list holds several sections."""
    if isinstance(place, list):
        for number, part in enumerate(place):
            if isinstance(part, str) and len(keys) == 1:
                yield place, number
            elif isinstance(part, dict):
                yield from _places(part, keys)
    elif isinstance(place, dict) and len(keys) == 1:
        yield place, keys[0]
    elif isinstance(place, dict) and keys[0] == ANY:
        for name in place:
            yield from _places(place, (name, *keys[1:]))
    elif isinstance(place, dict):
        inner = place.get(keys[0])
        # A data set may be its path alone.
        if isinstance(inner, str):
            yield place, keys[0]
        else:
            yield from _places(inner, keys[1:])


def _anchor(place: Any, key: Any, folder: Path) -> None:
    """Make a relative path absolute where it exists beside the config file."""
    text = place[key] if isinstance(place, list) else place.get(key)
    if not isinstance(text, str):
        return
    if path_fault(text):
        return  # validation says it
    try:
        value = Path(text).expanduser()
        if not value.is_absolute() and (folder / value).exists():
            place[key] = str((folder / value).resolve())
        elif value.exists():
            place[key] = str(value.resolve())
    except (OSError, RuntimeError):
        return  # an unknown `~user`, a link to itself, a folder that may not be read: told where it is opened


def validate_mapping(cls: type[Model], mapping: Mapping[str, Any], where: str) -> Model:
    """Validate a mapping as a config model, with all errors at once.

    Args:
        cls: the model.
        mapping: plain values.
        where: name of the source for messages.

    Raises:
        ConfigError: one per mistake; the first is raised and carries the others in `also`.
    """
    if (place := _half_character(mapping)) is not None:
        raise ConfigError(
            "this has half of a character (a lone surrogate), which no file can hold",
            where=f"{where}: {shortened(place)}",
            fix="write the character itself, not an escape of its half",
        )
    try:
        return cls.model_validate(mapping)
    except ValidationError as err:
        raise config_error(cls, err, where) from err


def _half_character(value: Any, place: str = "config") -> str | None:
    """Dotted place of the first key or text with a lone surrogate; None where there is none."""
    if isinstance(value, str):
        return place if HALF.search(value) else None
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return None
    for key, inner in items:
        if isinstance(key, str) and HALF.search(key):
            return f"a key in {place}"
        if (found := _half_character(inner, str(key) if place == "config" else f"{place}.{key}")) is not None:
            return found
    return None


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema() -> dict[str, Any]:
    """JSON Schema of the config, for editors."""
    schema = Config.model_json_schema()
    for section, name in ((section, name) for section, names in SECTIONS.items() for name in names):
        fields = schema["$defs"][name]["properties"]
        for alias, target in ALIASES[section].items():
            if target.key in fields:
                fields[alias] = {"description": f"The name of `{target.key}` in transformers, TRL or peft."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def known_keys() -> list[str]:
    """Every dotted key that `--set` takes, in the order of the config."""
    return list(_keys(Config, ""))


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = next(iter(models_in(field.annotation)), None)
        if inner is None or by_name(field.annotation):
            yield prefix + name
        else:
            yield from _keys(inner, f"{prefix}{name}.")


def config_error(cls: type[BaseModel], err: ValidationError, where: str) -> ConfigError:
    """The first mistake, with all others in `also`.

    Args:
        cls: the model that refused its values.
        err: what pydantic says.
        where: name of the source, such as the config file.
    """
    problems = [_problem(cls, detail, where) for detail in err.errors(include_url=False)]
    # A union reports every branch it tried; the first is the plainest.
    unique = list({problem.where: problem for problem in reversed(problems)}.values())[::-1]
    first = unique[0]
    return ConfigError(first.what, where=first.where, fix=first.fix, also=unique[1:])


def _problem(cls: type[BaseModel], detail: Any, where: str) -> ConfigError:
    """One pydantic error as what, where, fix."""
    location = [part for part in detail["loc"] if not _is_union_branch(part)]
    dotted = shortened(".".join(str(part) for part in location), 200) or "(top level)"
    place = f"{where}: {dotted}"
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = _fields_at(cls, location[:-1])
        close = difflib.get_close_matches(str(location[-1])[:80], known, n=1)
        fix = f"did you mean `{close[0]}`?" if close else f"known keys here: {', '.join(sorted(known))}"
        return ConfigError(f"unknown key `{shortened(str(location[-1]))}`", where=place, fix=fix)
    if kind == "missing":
        return ConfigError(f"`{location[-1]}` is required", where=place, fix=_describe(cls, location))
    message = str(detail["msg"]).removeprefix("Value error, ")
    given = detail.get("input")
    long = isinstance(given, BaseModel) or (isinstance(given, (dict, list)) and len(str(given)) > 60)
    shown = "" if long else f" (given: {_shown(given)})"
    return ConfigError(f"{message}{shown}", where=place, fix=_describe(cls, location))


def _shown(given: Any) -> str:
    """A value as it is told; whole numbers of thousands of digits cannot even be written out."""
    if isinstance(given, int) and abs(given) >= 10**20:
        return f"a number of about 2^{given.bit_length()}"
    return shortened(repr(given))


def _is_union_branch(part: Any) -> bool:
    """Pydantic names the branch of a union in the location; people did not write that."""
    return isinstance(part, str) and (
        part
        in ("function-before", "bool", "int", "float", "str", "ParameterGlobs", "DataConfig", "AdapterConfig")
        or part.startswith(("literal[", "constrained-", "list[", "function-"))
    )


def _section_at(cls: type[BaseModel], location: Sequence[Any]) -> type[BaseModel] | None:
    """The config model at a dotted location, where there is one."""
    here: type[BaseModel] | None = cls
    named = False
    for part in location:
        # A number is a place in a list, whose members are of one kind; so are those of a mapping by name.
        if isinstance(part, int) or named:
            named = False
            continue
        if here is None or part not in here.model_fields:
            return None
        annotation = here.model_fields[part].annotation
        here, named = next(iter(models_in(annotation)), None), by_name(annotation)
    return here


def by_name(annotation: Any) -> bool:
    """Whether a field holds sections by names that the user gives."""
    return typing.get_origin(annotation) is dict and any(models_in(annotation))


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every pydantic model inside a type annotation, unions included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models_in(inner)


def _fields_at(cls: type[BaseModel], location: Sequence[Any]) -> list[str]:
    section = _section_at(cls, location)
    if section is None:
        return []
    own = section.__name__.removeprefix("_")
    names = next((key for key, models in SECTIONS.items() if own in models), "")
    return [*section.model_fields, *ALIASES.get(names, ())]


def _describe(cls: type[BaseModel], location: Sequence[Any]) -> str:
    """What a field takes: its documentation and allowed values."""
    section = _section_at(cls, location[:-1]) if location else None
    field = section.model_fields.get(str(location[-1])) if section and location else None
    if field is None:
        return "see `arisk schema` or `arisk init` for what is allowed"
    allowed = [repr(value) for value in _literals(field.annotation)]
    values = f"; one of {', '.join(allowed)}" if allowed else ""
    return f"{field.description or 'see `arisk schema`'}{values}"


def _literals(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is typing.Literal:
        yield from typing.get_args(annotation)
    elif typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from _literals(inner)
