"""The command line: Typer verbs. `main()` is the one place where errors become exit codes.

Results go to stdout, progress and errors to stderr. No torch is imported here: `--help` and
`status` answer at once. `stages` holds the verbs of a run, `acts` those that act on one.
"""

from __future__ import annotations

from arisk.cli import acts, stages
from arisk.cli import acts as compare
from arisk.cli.app import app, main

__all__ = ["acts", "app", "compare", "main", "stages"]
