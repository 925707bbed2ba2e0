"""Progress on stderr: one line that renews itself in a terminal, one line per finished stage in a pipe.

Written by hand, on the standard library: no line is ever wider than the terminal, nothing but plain text
reaches a pipe, and `status` and `--help` load no library for it.

Plain text tables are readable at 80 columns and in a pipe.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress

from arisk.base.errors import ArtifactError

__all__ = [
    "StageDisplay",
    "clock",
    "columns",
    "fancy",
    "fitted",
    "natives_silenced",
    "peak_memory",
    "printable",
    "said",
    "say",
    "table",
    "wrapped",
]

#: Seconds between two renewals of the line.
RENEW = 0.1
#: Seconds between two signs of life in a pipe.
BEAT = 60.0
#: Columns of a terminal that does not tell, and the least that is used.
COLUMNS, LEAST = 80, 30


#: A colour that arisk itself sets (bold, and back), or else what a terminal may take for a command or show
#: in another order: C0 without tab and line feed, DEL, C1, marks of direction, halves of characters.
COMMANDS = re.compile(
    "\x1b\\[(?:1;3[0-7]|0)m|[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with everything a terminal would obey written out, as `\x1b`; our colours stay.

    Texts of data, models, paths and configs may hold commands that set the clipboard or the title, hide
    what follows, or answer for the user. All of them reach a terminal through here.
    """
    return COMMANDS.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    if len(found.group()) > 1:
        return found.group()
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


def say(text: str, *, err: bool = False) -> None:
    """One text and a line feed on stdout or stderr, made printable.

    A reader that has gone away (`| head`) does not fail what is done; nothing more is written then.

    Raises:
        ArtifactError: stdout cannot take it, as on a full disk.
    """
    stream = sys.stderr if err else sys.stdout
    if stream is None:
        return
    shown = printable(text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(shown.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except BrokenPipeError:
        # Python flushes once more at its end, and would complain then.
        silenced = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silenced, stream.fileno())
        os.close(silenced)
    except OSError as fault:
        if err:
            return
        raise ArtifactError(
            f"the output cannot be written: {fault.strerror or fault}",
            where="stdout",
            fix="send it elsewhere; the run itself is kept",
        ) from fault


@contextmanager
def natives_silenced() -> Generator[None]:
    """What compiled code prints past Python's streams goes nowhere meanwhile; `ARISK_DEBUG` lets it through.

    Such lines may hold whatever stands in a foreign file, commands for a terminal too.
    """
    kept: dict[int, int] = {}
    if not os.environ.get("ARISK_DEBUG"):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        for number in (1, 2):
            with suppress(OSError):  # Closed: nothing can be printed there.
                kept[number] = os.dup(number)
    silence = os.open(os.devnull, os.O_WRONLY) if kept else None
    try:
        if silence is not None:
            for number in kept:
                os.dup2(silence, number)
        yield
    finally:
        for number, before in kept.items():
            os.dup2(before, number)
            os.close(before)
        if silence is not None:
            os.close(silence)


def fancy(stream: object) -> bool:
    """Whether a stream is a terminal that understands control characters (`TERM=dumb` does not)."""
    isatty = getattr(stream, "isatty", None)
    return bool(isatty and isatty()) and os.environ.get("TERM") != "dumb"


def columns(stream: object) -> int:
    """Width of the terminal behind a stream, in columns, ≥ 30."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns  # type: ignore[attr-defined]
    except (OSError, ValueError, AttributeError):
        width = 0
    return max(LEAST, width or shutil.get_terminal_size((COLUMNS, 24)).columns)


def wrapped(text: str, stream: object, *, indent: str = "") -> str:
    """A sentence broken to the width of a terminal, the later lines indented; unbroken in a pipe."""
    isatty = getattr(stream, "isatty", None)
    if not (isatty and isatty()):
        return text
    lines = textwrap.wrap(
        text,
        columns(stream) - 1,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    return "\n".join(lines)


def peak_memory() -> float | None:
    """Largest resident memory of this process so far, in GB (10⁹ bytes); None where unknown."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def clock(seconds: float) -> str:
    """A duration as 4.2 s, 3:07 or 2:03:07."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class StageDisplay:
    """Shows stages and their progress on stderr; in a pipe a line per stage.

    Args:
        quiet: show nothing but what an interruption leaves.
        resume: the command that goes on after an interruption.
    """

    def __init__(self, *, quiet: bool = False, resume: str = "") -> None:
        self.quiet = quiet
        self.resume = resume
        self._due: tuple[str, ...] = ()
        self._stage = ""
        self._label = ""
        self._first = 0
        self._shown = False
        self._began = self._stage_began = self._label_began = time.monotonic()
        self._renewed = self._beat = 0.0

    def planned(self, due: Sequence[str]) -> None:
        """The stages that will run, in order."""
        self._due = tuple(due)

    def start(self, stage: str, why: str) -> None:
        """A stage begins; `why` says what made it stale."""
        self._stage, self._label, self._stage_began = stage, "", time.monotonic()
        if not self.quiet:
            self._beat = self._stage_began
            told = f"running ({why})" if why else "running"
            self._line(f"{self._place():<10} {stage:<9} {told}", indent=" " * 21)

    def progress(self, label: str, done: int, total: int) -> None:
        """The `arisk.base.task.Progress` callback of the running stage."""
        now = time.monotonic()
        if label != self._label or done < self._first:
            self._label, self._label_began, self._first = label, now, done
        if self.quiet:
            return
        if not fancy(sys.stderr):
            if now - self._beat >= BEAT:
                self._beat = now
                moving = self._moving(now - self._label_began, done, total).strip()
                self._line(f"{self._place():<10} {self._stage:<9} {moving}")
            return
        if now - self._renewed >= RENEW or done >= total:
            self._renewed = now
            self._write(f"\r\x1b[2K{self._moving(now - self._label_began, done, total)}")
            self._shown = True

    def finish(self, stage: str) -> None:
        """A stage is committed."""
        if not self.quiet:
            took = clock(time.monotonic() - self._stage_began)
            memory = peak_memory()
            peak = "" if memory is None else f", peak memory {memory:.2f} GB"
            self._line(f"{self._place():<10} {stage:<9} done in {took}{peak}", indent=" " * 21)
        self._stage = ""

    def skip(self, stage: str) -> None:
        """A stage is fresh."""
        if not self.quiet:
            self._line(f"{stage:<9} up to date")

    def note(self, text: str) -> None:
        """Something else to know, in one line."""
        if not self.quiet:
            self._line(text)

    def interrupted(self) -> None:
        """Ctrl-C or SIGTERM: say what is kept and how to go on, even when quiet."""
        self._line(
            f"interrupted in {self._stage or 'planning'}: finished stages and finished parts "
            "of this one are kept; run the same command again to go on" + (":" if self.resume else "")
        )
        if self.resume:
            self._write(f"  {printable(self.resume)}\n")

    def failed(self) -> None:
        """An error ends the stage; the moving line must not stay."""
        self._erase()

    def _place(self) -> str:
        if self._stage not in self._due:
            return "stage"
        return f"stage {self._due.index(self._stage) + 1} of {len(self._due)}"

    def _moving(self, seconds: float, done: int, total: int) -> str:
        """Label, count, rate, time left and memory; what cannot be known yet is left out."""
        parts = [f"{done}/{total}"]
        steps = done - self._first
        if steps > 0 and seconds > 0:
            rate = steps / seconds
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each")
            if done < total:
                parts.append(f"{clock((total - done) / rate)} left")
        memory = peak_memory()
        if memory is not None:
            parts.append(f"peak {memory:.2f} GB")
        numbers = " · ".join(parts)
        room = max(0, columns(sys.stderr) - len(numbers) - 4)
        label = printable(self._label)
        label = label if len(label) <= room else label[: room - 1] + "…"
        return f"  {label} {numbers}"

    def _line(self, text: str, *, indent: str = "") -> None:
        self._erase()
        self._write(wrapped(printable(text), sys.stderr, indent=indent) + "\n")

    def _erase(self) -> None:
        if self._shown:
            self._write("\r\x1b[2K")
            self._shown = False

    def _write(self, text: str) -> None:
        """To stderr; a reader that has gone away does not stop a run."""
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, UnicodeEncodeError):
            self._shown = False


def table(rows: Sequence[Sequence[str]], header: Sequence[str], *, width: int | None = None) -> str:
    """A plain aligned table.

    Args:
        rows: the cells; an empty tail of a row leaves its last text free to run to the right.
        header: names of the columns.
        width: columns of the terminal, to which the last text of a row is wrapped; None: no wrapping.
    """
    filled = [_without_tail(row) for row in [header, *rows]]
    sizes = [max((len(r[i]) for r in filled if i < len(r) - 1), default=0) for i in range(len(header))]
    sizes = [max(size, len(name)) for size, name in zip(sizes, header, strict=True)]
    full = [row[-1] for row in filled if len(row) == len(header)]
    sizes[-1] = max([len(header[-1]), *map(len, full)])
    if width is not None:
        sizes[-1] = max(len(header[-1]), min(sizes[-1], width - sum(sizes[:-1]) - 2 * len(header) + 2))
    lines = [line for row in filled for line in _row_lines(row, sizes, width)]
    lines.insert(1, "  ".join("-" * size for size in sizes))
    return "\n".join(lines)


def _without_tail(row: Sequence[str]) -> list[str]:
    """The cells up to the last one that is not empty."""
    cells = list(row)
    while len(cells) > 1 and not cells[-1]:
        cells.pop()
    return cells


def _row_lines(row: Sequence[str], sizes: Sequence[int], width: int | None) -> list[str]:
    """One row, its last text wrapped below itself."""
    start = "".join(cell.ljust(size) + "  " for cell, size in zip(row[:-1], sizes, strict=False))
    if width is None or len(start) + len(row[-1]) <= width:
        return [(start + row[-1]).rstrip()]
    room = max(16, width - len(start))
    parts = textwrap.wrap(row[-1], room, break_on_hyphens=False, break_long_words=False)
    return [(start + part if i == 0 else " " * len(start) + part).rstrip() for i, part in enumerate(parts)]


def fitted(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """The table wrapped to the terminal; as wide as it is in a pipe."""
    return table(rows, header, width=columns(sys.stdout) - 1 if sys.stdout.isatty() else None)


def said(text: str, indent: str = "") -> str:
    """A sentence wrapped to the terminal, its later lines indented; one line in a pipe."""
    return wrapped(text, sys.stdout, indent=indent)
