"""Numbers in words. What was not measured says so, never 0.

Text for pull-request comments and job summaries: escaped, on one line, and never too long to post.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

__all__ = [
    "LIMIT",
    "NOT_MEASURED",
    "bounded",
    "chance",
    "duration",
    "literal",
    "number",
    "percent",
    "signed",
    "wilson",
]

NOT_MEASURED = "not measured"


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; None and NaN are not measured."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    if math.isinf(value):
        return "unbounded" if value > 0 else "−unbounded"
    return f"{value:.{digits}g}".replace("-", "−")


def signed(value: float | None, digits: int = 2) -> str:
    """A change with its sign: `+0.62`; None and NaN are not measured.

    >>> signed(0.6234), signed(-0.00012), signed(None)
    ('+0.62', '−0.00012', 'not measured')
    """
    told = number(value, digits)
    return told if value is None or math.isnan(value) or value < 0 else f"+{told}"


def duration(seconds: float) -> str:
    """Seconds with three digits up to two minutes, then minutes, then hours and minutes.

    >>> duration(24.12), duration(185), duration(7500)
    ('24.1 s', '3 min', '2 h 5 min')
    """
    if seconds < 120:
        return f"{number(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def percent(value: float | None) -> str:
    """A share as a percentage; None and NaN are not measured."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    if 0 < value < 0.01:
        return "< 1 %"
    if 0.99 < value < 1:
        return "> 99 %"
    return f"{value:.0%}".replace("%", " %")


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, 95 % at z = 1.96: (0, 1) of nothing.

    (k + z²/2 ± z √(k (n − k)/n + z²/4)) / (n + z²), of k in n.

    Args:
        hits: k.
        count: n.
        z: standard normal quantile.

    >>> [round(x, 2) for x in wilson(0, 7)]
    [0.0, 0.35]
    """
    if not count:
        return 0.0, 1.0
    share, extra = hits / count, z * z / count
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / count + extra / count / 4) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def chance(probability: float | None) -> str:
    """A probability as a percentage; draws that all agree are no certainty, so never 0 % or 100 %.

    >>> chance(1.0), chance(0.0), chance(0.615)
    ('> 99 %', '< 1 %', '62 %')
    """
    if probability is None or math.isnan(probability):
        return NOT_MEASURED
    if probability < 0.01:
        return "< 1 %"
    return "> 99 %" if probability > 0.99 else f"{probability:.0%}".replace("%", " %")


#: Characters of a whole text; the comments of the common forges end at 65 536.
LIMIT = 60_000
#: Characters of one name or sentence from data.
LONGEST = 400
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
#: What Markdown reads as markup anywhere in a line.
MARKUP = frozenset("\\`*_{}[]#|~")
#: What opens a list at the beginning of a line.
OPENING = re.compile(r"^(\d+)?([-+.)])(?=\s|$)")


def literal(text: str) -> str:
    r"""Text that Markdown and HTML show as it is: one line, safe inside a table cell and a list item.

    Mentions are broken by a zero-width space, so that no name in the data calls anybody. Control and
    direction characters are left out. What is longer than 400 characters is cut.

    >>> literal("a | b <c> *d*")
    'a \\| b &lt;c&gt; \\*d\\*'
    """
    line = " ".join("".join(_visible(char) for char in text).split())
    cut = line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
    escaped = "".join(f"\\{char}" if char in MARKUP else ENTITIES.get(char, char) for char in cut)
    escaped = re.sub(r"@(?=\w)", "@\u200b", escaped)
    return OPENING.sub(r"\1\\\2", escaped)


def _visible(char: str) -> str:
    """The character; a space for line ends and tabs, nothing for what changes how others are shown."""
    kind = unicodedata.category(char)
    if kind in ("Zl", "Zp") or char in "\n\r\t\v\f":
        return " "
    return "" if kind in ("Cc", "Cs") or unicodedata.bidirectional(char) in _DIRECTIONS else char


_DIRECTIONS = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))


def bounded(lines: Sequence[str], last: str) -> str:
    """Lines as one text of at most `LIMIT` characters; what does not fit is left out, and that is said.

    Args:
        lines: in order of importance.
        last: the closing line, kept in any case.
    """
    text = "\n".join([*lines, last, ""])
    if len(text) <= LIMIT:
        return text
    note = "… shortened: the report holds the rest."
    room = LIMIT - len(note) - len(last) - 8
    kept: list[str] = []
    for line in lines:
        room -= len(line) + 1
        if room < 0:
            break
        kept.append(line)
    return "\n".join([*kept, "", note, "", last, ""])
