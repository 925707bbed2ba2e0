"""Loading models, adapters and data sets: the only home of transformers, peft and datasets."""

from __future__ import annotations

from arisk.models.tasks import load_task

__all__ = ["load_task"]
