"""The list of commands in `arisk --help`, in groups and in whole sentences."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

__all__ = ["GROUPS", "Grouped"]

#: Headings with their commands, in the order a newcomer meets them.
GROUPS = {
    "Forecast a plan": ("run", "check", "status", "what-if", "compare"),
    "Act on the risk": ("verify", "screen", "guard"),
    "Set up": ("demo", "init", "schema"),
    "Stages one by one": ("collect", "subspace", "score", "rollout", "forecast", "report"),
}
#: The formatter's unit for a text that is wrapped and never cut.
WHOLE = 10_000


class Grouped(TyperGroup):
    """Commands under headings; one that no group names comes last, so that none is hidden."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands in the order of `GROUPS`."""
        named = [name for names in GROUPS.values() for name in names]
        known = super().list_commands(ctx)
        return [name for name in named if name in known] + [name for name in known if name not in named]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every group as a section of its own."""
        left = self.list_commands(ctx)
        widest = max(map(len, left))
        for heading, names in (*GROUPS.items(), ("More", tuple(left))):
            rows: list[tuple[str, str]] = []
            for name in names:
                command = self.get_command(ctx, name) if name in left else None
                if command is not None and not command.hidden:
                    rows.append((name.ljust(widest), command.get_short_help_str(WHOLE)))
                    left.remove(name)
            if rows:
                with formatter.section(heading):
                    formatter.write_dl(rows)
