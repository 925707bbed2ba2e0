"""The command line: Typer verbs. `main()` is the one place where errors become exit codes.

Results go to stdout, progress and errors to stderr. No torch is imported here: `--help` and
`status` answer at once. `stages` holds the verbs of a run and of every stage, `plans` those that lay several
plans side by side.
"""

from __future__ import annotations

from arisk.cli import plans, stages
from arisk.cli.app import app, main

__all__ = ["app", "main", "plans", "stages"]
