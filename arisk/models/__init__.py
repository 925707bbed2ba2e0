"""Loading models, adapters and data sets: the only home of transformers, peft and datasets."""

from __future__ import annotations

from arisk.models.check import check_task
from arisk.models.task_loading import load_task

__all__ = ["check_task", "load_task"]
