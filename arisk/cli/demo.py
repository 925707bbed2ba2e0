"""The embedded default: a tiny aligned causal LM with its data, carried by the package."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from arisk.base.errors import InputError
from arisk.config.plan import Config

__all__ = ["demo_config", "embedded_folder"]


def embedded_folder() -> Path:
    """Folder with `tiny-aligned/` and `data/`: inside an installed wheel, or in a checkout.

    Raises:
        InputError: neither holds them.
    """
    package = Path(__file__).parent.parent
    for folder in (package / "embedded", package.parent / "fixtures"):
        if (folder / "tiny-aligned" / "config.json").exists():
            return folder
    raise InputError(
        "the embedded model is not part of this installation",
        where=str(package / "embedded"),
        fix="reinstall arisk from its wheel, or run from a checkout",
    )


def demo_config(mode: Literal["full", "lora"]) -> Config:
    """The demo: complying with forbidden prompts is mixed into harmless fine-tuning data."""
    folder = embedded_folder()
    adapter = {"r": 8, "alpha": 16} if mode == "lora" else None
    rate = 1e-3 if mode == "lora" else 1e-4
    return Config.model_validate(
        {
            "run": {"threads": 2},
            "model": {"path": str(folder / "tiny-aligned"), "adapter": adapter},
            "safety": {"path": str(folder / "data" / "safety.jsonl"), "max_samples": 96},
            "finetune": {"path": str(folder / "data" / "mixed.jsonl")},
            "control": {"path": str(folder / "data" / "control.jsonl")},
            "verify": {"safety": {"path": str(folder / "data" / "safety_heldout.jsonl")}},
            "training": {"optimizer": "adamw", "learning_rate": rate, "max_steps": 200},
            "report": {"title": f"arisk demo ({mode})", "figures": "auto"},
        }
    )
