"""Pydantic's validation errors as one `ConfigError`: every mistake with its place and a remedy."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from arisk.base.errors import ConfigError

__all__ = ["config_error", "models_in"]


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
    dotted = ".".join(str(part) for part in location) or "(top level)"
    place = f"{where}: {dotted}"
    kind = detail["type"]
    if kind == "extra_forbidden":
        known = _fields_at(cls, location[:-1])
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        fix = f"did you mean `{close[0]}`?" if close else f"known keys here: {', '.join(sorted(known))}"
        return ConfigError(f"unknown key `{location[-1]}`", where=place, fix=fix)
    if kind == "missing":
        return ConfigError(f"`{location[-1]}` is required", where=place, fix=_describe(cls, location))
    message = str(detail["msg"]).removeprefix("Value error, ")
    given = detail.get("input")
    long = isinstance(given, BaseModel) or (isinstance(given, (dict, list)) and len(str(given)) > 60)
    shown = "" if long else f" (given: {given!r})"
    return ConfigError(f"{message}{shown}", where=place, fix=_describe(cls, location))


def _is_union_branch(part: Any) -> bool:
    """Pydantic names the branch of a union in the location; people did not write that."""
    return isinstance(part, str) and (
        part
        in ("function-before", "bool", "int", "float", "str", "ParameterGlobs", "DataConfig", "AdapterConfig")
        or part.startswith(("literal[", "constrained", "list[", "function-"))
    )


def _section_at(cls: type[BaseModel], location: Sequence[Any]) -> type[BaseModel] | None:
    """The config model at a dotted location, where there is one."""
    here: type[BaseModel] | None = cls
    for part in location:
        if here is None or part not in here.model_fields:
            return None
        here = next(iter(models_in(here.model_fields[part].annotation)), None)
    return here


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Every pydantic model inside a type annotation, unions included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from models_in(inner)


def _fields_at(cls: type[BaseModel], location: Sequence[Any]) -> list[str]:
    section = _section_at(cls, location)
    return list(section.model_fields) if section else []


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
