"""Several planned fine-tunes of one model, ranked: what `arisk compare` does.

Run directories are read from their artifacts alone. Configs are run first, with one safety side for all
of them (`arisk.engine.freshness`).
"""

from __future__ import annotations

from arisk.compare.run import Compared, compare_plans

__all__ = ["Compared", "compare_plans"]
