"""Numbers in words. What was not measured says so, never 0.

Text for pull-request comments and job summaries: escaped, on one line, and never too long to post.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from arisk.forecast.record import Curve, ForecastResult, RolloutResult

__all__ = [
    "LIMIT",
    "NOT_MEASURED",
    "bounded",
    "collapse_text",
    "drift_sentence",
    "last_drift",
    "layer_and_type",
    "literal",
    "number",
    "percent",
    "sample_sentence",
]

NOT_MEASURED = "not measured"
#: Changes below this share of the threshold are no rise worth a word.
NO_RISE = 0.1
#: Safety over control change from which harm is called specific, and up to which it is called general.
SPECIFIC, GENERAL = 2.0, 1.25


def number(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; None and NaN are not measured."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    if math.isinf(value):
        return "unbounded" if value > 0 else "−unbounded"
    return f"{value:.{digits}g}".replace("-", "−")


def percent(value: float | None) -> str:
    """A share as a percentage; None and NaN are not measured."""
    if value is None or math.isnan(value):
        return NOT_MEASURED
    if 0 < value < 0.01:
        return "< 1 %"
    if 0.99 < value < 1:
        return "> 99 %"
    return f"{value:.0%}".replace("%", " %")


def collapse_text(curve: Curve) -> str:
    """Collapse step with its horizon; the two never stand apart."""
    if curve.status != "measured":
        return NOT_MEASURED
    if curve.collapse_step is None:
        return f"none within {curve.horizon} steps"
    return f"step {curve.collapse_step} of {curve.horizon}"


def layer_and_type(module: str) -> tuple[int | None, str]:
    """Layer number and module type from a name.

    >>> layer_and_type("base_model.model.model.layers.3.self_attn.q_proj")
    (3, 'self_attn.q_proj')
    >>> layer_and_type("lm_head")
    (None, 'lm_head')
    """
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    if found is None:
        return None, module.removeprefix("base_model.model.").removeprefix("model.")
    return int(found.group(1)), module[found.end() :] or module


def drift_sentence(forecast: ForecastResult) -> str | None:
    """Which part of the rollout's safety drift is specific, at the step where safety is worst.

    In order: no rise of the safety loss; a rise with no rise of the control loss; at least `SPECIFIC`
    times as fast; more than `GENERAL` times as fast; else general. None where it was not measured.
    """
    curve, control = forecast.forecasters.get("rollout"), forecast.control_change
    if curve is None or curve.status != "measured" or control is None:
        return None
    triples = zip(curve.median, control, curve.steps, strict=True)
    known = [(s, c, k) for s, c, k in triples if math.isfinite(s) and math.isfinite(c)]
    least = NO_RISE * forecast.threshold
    worst = max(known, key=lambda triple: triple[0])
    safety, ordinary, step = worst if worst[0] >= least else known[-1]
    facts = f"safety {_signed(safety)}, control {_signed(ordinary)} nats/token at step {step} of the rollout"
    if safety < least:
        general = ", though ordinary answers get worse" if ordinary >= least else ""
        return f"The safety loss does not rise{general} ({facts})."
    if ordinary < least:
        return f"Safety is lost while ordinary answers stay as good: the harm is specific ({facts})."
    ratio = safety / ordinary
    times = f"Safety rises {ratio:.2g} times as fast as the control loss"
    if ratio >= SPECIFIC:
        return f"{times}: the harm is specific ({facts})."
    if ratio > GENERAL:
        share = percent(1 - 1 / ratio)
        return f"{times}: {share} of the rise is specific to safety, the rest general drift ({facts})."
    return f"The control loss rises about as fast as safety or faster: the drift is general ({facts})."


def _signed(value: float) -> str:
    return f"{value:+.2g}".replace("-", "−")


def sample_sentence(measured: RolloutResult | None, threshold: float) -> str | None:
    """How the drift at the last finite point of the rollout is shared among the safety samples.

    Says how many rise by the threshold, and how few carry half of all rises; None where not measured.
    """
    drift = last_drift(measured)
    if drift is None:
        return None
    step, values = drift
    lost = sum(value >= threshold for value in values)
    rises = sorted((value for value in values if value > 0), reverse=True)
    said = f"{lost} of {len(values)} safety rows lose {threshold:g} nats/token or more by step {step}"
    if lost == 0 or not rises:
        return f"{said}."
    half, count = 0.5 * sum(rises), 0
    while half > 0:
        half -= rises[count]
        count += 1
    few = "so it is a few of them" if count <= 0.1 * len(values) else "so it is not a few of them alone"
    return f"{said}; {count} {'row carries' if count == 1 else 'rows carry'} half of all rise, {few}."


def last_drift(measured: RolloutResult | None) -> tuple[int, list[float]] | None:
    """The last step of the rollout at which every sample is finite, and the changes there (nats)."""
    if measured is None or measured.status != "measured":
        return None
    for column in range(len(measured.steps) - 1, 0, -1):
        values = measured.safety[:, column]
        if bool(values.isfinite().all()):
            return measured.steps[column], values.tolist()
    return None


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
