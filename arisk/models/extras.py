"""The Hugging Face stack, imported where it is needed and missed with a remedy."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from arisk.base.errors import MissingExtraError

__all__ = ["hf_module"]


def hf_module(name: str) -> ModuleType:
    """Import transformers, peft or datasets.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as err:
        if err.name and not name.startswith(err.name):
            what = f"the package {err.name!r}, which {name} needs, is not installed"
        else:
            what = f"the package {name!r} is not installed"
        extra = "gguf" if err.name == "gguf" else "hf"
        raise MissingExtraError(what, where=f"import {name}", fix=f'pip install "arisk[{extra}]"') from err
