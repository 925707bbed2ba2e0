"""The one exception family of arisk: what went wrong, where, and how to fix it.

::

    AriskError                exit code 1
    ├── ConfigError           2   a config key, value or file is wrong
    ├── InputError            3   a model, data file or row is wrong
    ├── ArtifactError         4   the run directory or one of its files is wrong
    │   ├── DamagedError      cannot be read back
    │   └── NewerFormatError  of a newer format: neither read nor overwritten
    ├── ShapeError            5   tensors do not fit together
    ├── NumericsError         6   NaN, inf, zero gradient or zero update
    ├── MissingExtraError     7   an optional package is not installed
    ├── GateError             10  the verdict reached the ``--fail-on`` level
    └── InconclusiveError     11  a gate was asked for and the verdict is inconclusive

Nothing outside this module decides an exit code. An interrupted run (Ctrl-C) exits with 130.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AriskError",
    "ArtifactError",
    "ConfigError",
    "DamagedError",
    "GateError",
    "InconclusiveError",
    "InputError",
    "MissingExtraError",
    "NewerFormatError",
    "NumericsError",
    "ShapeError",
]


#: Characters of one part of an error that are printed; values of data and configs may have any number.
LONGEST = 1500


def _cut(text: str) -> str:
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST * 2 // 3]} … {text[-LONGEST // 4 :]} ({len(text)} characters)"


class AriskError(Exception):
    """An error a person can act on.

    Args:
        what: one sentence that says what is wrong, with the offending value.
        where: dotted config path, file (and line or row), tensor or stage.
        fix: what to do about it, as an instruction.
        also: further errors found at the same time; they are printed after this one.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str, fix: str, also: Sequence[AriskError] = ()) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix
        self.also = tuple(also)

    def lines(self) -> list[str]:
        """Return the error and those found with it as printable lines, three per error, none without end."""
        parts = (("error: ", self.what), ("where: ", self.where), ("fix:   ", self.fix))
        own = [f"{name}{_cut(text)}" for name, text in parts]
        return own + [line for other in self.also for line in other.lines()]

    def __str__(self) -> str:
        return "\n".join(self.lines())


class ConfigError(AriskError):
    """A config key, value or file is wrong."""

    exit_code = 2


class InputError(AriskError):
    """A model, a data file or a row in it is wrong."""

    exit_code = 3


class ArtifactError(AriskError):
    """The run directory, or an artifact in it, is missing, damaged or locked."""

    exit_code = 4


class DamagedError(ArtifactError):
    """A file of the run directory cannot be read back; `where` is its path."""


class NewerFormatError(ArtifactError):
    """An artifact was written by a newer arisk; it is neither read nor overwritten."""


class ShapeError(AriskError):
    """Tensors do not fit together."""

    exit_code = 5


class NumericsError(AriskError):
    """A loss, gradient or update is NaN, infinite or exactly zero."""

    exit_code = 6


class MissingExtraError(AriskError):
    """An optional package is not installed; ``fix`` carries the install command."""

    exit_code = 7


class GateError(AriskError):
    """The verdict reached the level given by ``--fail-on``."""

    exit_code = 10


class InconclusiveError(AriskError):
    """A gate was asked for, and the verdict is inconclusive."""

    exit_code = 11
