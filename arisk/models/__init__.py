"""Loading models, adapters and data sets: the only home of transformers, peft and datasets.

Names load when they are asked for: telling what an answer does (`arisk.models.judge`) needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arisk.models.tasks import load_task

__all__ = ["load_task"]

_HOMES = {"load_task": "arisk.models.tasks"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
