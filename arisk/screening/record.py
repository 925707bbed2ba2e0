"""What a screening of the fine-tuning rows found: the record of stage screen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

__all__ = ["LEAST_LENGTH", "MEASURES", "UNITS", "ScreenPoint", "ScreenResult"]

#: What harm is measured by, with what rises when safety goes.
MEASURES = {
    "loss": "the mean loss of the safe responses",
    "opening": "the loss of the first tokens of the model's own refusals",
}
#: Units of the scores, by kind.
UNITS = {
    "point": "nats per unit learning rate",
    "path": "nats per unit of the row's weight",
    "anchors": "difference of mean cosines",
}
#: Least relative length that a score is divided by.
LEAST_LENGTH = 1e-9
#: |ρ| of score and length from which a reader is told, and rows from which that is more than chance.
LENGTH_MATTERS, LENGTH_ROWS = 0.5, 20


@dataclass(frozen=True)
class ScreenPoint:
    """Where on the planned run gradients were taken.

    Attributes:
        step: real optimizer steps before it; 0 is the aligned model θ*.
        safety_rise: rise of the mean safety loss there (nats per response token).
        control_rise: the same on control rows; None without them.
        weight: Σ η of the planned steps it stands for, over that of all points; in (0, 1].
    """

    step: int
    safety_rise: float
    control_rise: float | None
    weight: float

    @property
    def control_fall(self) -> float:
        """How far the control loss has fallen there (nats per response token); 0 where it is not measured."""
        return -(self.control_rise or 0.0)


@dataclass(frozen=True)
class ScreenResult:
    """Harm that every fine-tuning row is predicted to push, and the rows that are flagged.

    Attributes:
        scores: (N,) by `score`; positive is harmful.
            point: s_j = t_j Σ_c w_c ⟨∇L_c(θ_c) − ∇L_s(θ_c), D_c g_j(θ_c)⟩, the rise of the mean safety loss
            less that of the control loss per unit learning rate, where `contrasted`; else the former alone.
            path: what a row does along the run, estimated (`arisk.screening.path`). anchors: see
            `arisk.screening.anchors`.
        first_order: (N,) the safety part of it. control_order: (N,) the control part; None where not
            measured.
        losses, gradient_norms: (N,) at the last point; nats per response token.
        null: (N_c,) scores of control rows at mean length, at a point each left out of its own ∇L_c; None
            without control.
        method: "exact", or how rows were ranked first: by "differences" of their loss along the direction
            that rows are held against, by the "first_tokens" of their responses, or by a "sketch" of their
            gradient.
        exact: (N,) whether a row's numbers are exact products; of the others `scores` has the estimate,
            and all but `losses` is NaN (by differences a loss is that of the point to O(ε²), by first tokens
            it is NaN too).
        p_values: (N,) probability that a harmless row scores as high at mean length, by `null_source`; NaN
            for estimates.
        flagged: row numbers, the most harmful first.
        rule: how they were chosen, in words. threshold: smallest score at mean length that is flagged, NaN
            where none is, or where a share was asked for (`asked`) and score and score at mean length differ.
        null_source: "control", or "rows" where the bulk of the rows themselves had to serve.
        points: where gradients were taken. rise_reached: whether the planned run raised the safety
            loss as far as `rise` within the steps looked at.
        planned_steps: T. rise: the wanted rise (nats).
        share: share of the rows' total positive score that the flagged rows carry, NaN where no
            score is positive.
        length_correlation: Spearman's ρ of score at mean length and response tokens, in [−1, 1]; NaN where
            the lengths are not known.
        examples: most harmful rows, explained.
        what_if: forecasts with and without the flagged rows; `status` says where not measured.
        files: names of the JSONL files beside the record; empty where `files_missing` says why.
        warnings: sentences for the report.
        agreement: Spearman's ρ of estimates and exact scores on rows spread over the ranking; None where
            all scores are exact.
        score: kind of the scores, a key of `UNITS`.
        measure: what harm is measured by, a key of `MEASURES`.
        ceiling: highest of `null`; NaN where they are no null.
        excess: p-value of the test whether rows have a heavier upper tail than control rows
            (`upper_tail_excess`); None without enough control rows.
        beyond: share of the rows above the null's 5 % level; NaN where nothing could be flagged.
        unranked: why nothing was flagged though the run does harm, where `screen.score` is auto; None else.
        lengths: (N,) t_j, trained tokens over their mean; None where rows count alike.
        asked: whether a share was asked for, whose rows are those with the highest scores.
    """

    scores: Tensor
    first_order: Tensor
    control_order: Tensor | None
    losses: Tensor
    gradient_norms: Tensor
    null: Tensor | None
    method: str
    exact: Tensor
    p_values: Tensor
    contrasted: bool
    flagged: Sequence[int]
    rule: str
    threshold: float
    null_source: Literal["control", "rows"]
    points: Sequence[ScreenPoint]
    rise_reached: bool
    rise: float
    planned_steps: int
    share: float
    length_correlation: float
    examples: Sequence[Mapping[str, Any]]
    what_if: Mapping[str, Any]
    files: Sequence[str]
    files_missing: str | None
    warnings: Sequence[str]
    agreement: float | None = None
    score: str = "point"
    measure: str = "loss"
    ceiling: float = math.nan
    excess: float | None = None
    beyond: float = math.nan
    unranked: str | None = None
    lengths: Tensor | None = None
    asked: bool = False

    def length_of(self, row: int) -> float:
        """t_j: what the mean loss of a row counts for, beside a row of mean length."""
        return 1.0 if self.lengths is None else float(self.lengths[row])

    @property
    def at_mean_length(self) -> Tensor:
        """(N,) s_j/t_j: scores at mean length, as the null's are; 0 of a row without tokens."""
        return self.scores if self.lengths is None else self.scores / self.lengths.clamp(min=LEAST_LENGTH)

    @property
    def order(self) -> list[int]:
        """Row numbers by falling score; equal scores keep the data's order."""
        import torch

        return torch.argsort(self.scores, descending=True, stable=True).tolist()

    def reasons(self, row: int) -> list[str]:
        """Why a flagged row is flagged, in words."""
        told = f"score {float(self.scores[row]):+.3g} {UNITS[self.score]} {self.where}"
        if self.lengths is not None:
            told += f", {float(self.at_mean_length[row]):+.3g} at mean length"
        if not math.isnan(self.threshold):
            told += f", flagged from {self.threshold:.3g}"
        said = [f"{told}: {self.rule}"]
        if self.control_order is not None:
            said.append(
                f"pushes the safety loss by {float(self.first_order[row]):+.3g} and the control loss by "
                f"{float(self.control_order[row]):+.3g}"
            )
        for example in self.examples:
            if example["row"] != row:
                continue
            hurts = example.get("hurts") or []
            if hurts:
                said.append(f"hurts most the safety sample: {hurts[0]['prompt'] or hurts[0]['sample']}")
            if example.get("modules"):
                top = example["modules"][0]
                less = ", of which other modules take off" if top["share"] > 1 else ""
                said.append(f"{top['share']:.0%} of the safety part in {top['module']}{less}")
        return said

    @property
    def where(self) -> str:
        """Where on the planned run rows were scored, in words."""
        step = self.points[-1].step
        if self.score == "path":
            return f"over the first {step} steps of the planned run"
        return f"at step {step} of the planned run" if step else "at the aligned model"

    @property
    def sentence(self) -> str:
        """The result in one sentence."""
        rows, flagged = len(self.scores), len(self.flagged)
        if flagged == 0:
            return self.unranked or f"No row of {rows} is flagged{self._why_none()}."
        are, carry = ("is", "it carries") if flagged == 1 else ("are", "they carry")
        if math.isnan(self.share):
            return f"{flagged} of {rows} rows {are} flagged; no score is above zero, so none does harm."
        harm = f"{carry} {self.share:.0%} of the harm (scores above zero)"
        return f"{flagged} of {rows} rows {are} flagged; {harm}."

    def _why_none(self) -> str:
        """Why no row is flagged, in words."""
        if not self.rise_reached:
            point = self.points[-1]
            return (
                f": within {point.step} steps of the planned run {MEASURES[self.measure]} changes by "
                f"{point.safety_rise:+.3g} nats/token, less than the {self.rise:g} that rows are told from"
            )
        highest = float(self.at_mean_length.max())
        what = "score" if self.lengths is None else "score at mean length"
        if not math.isnan(self.ceiling) and highest <= max(self.ceiling, 0.0):
            return f": the highest {what} is {highest:.3g}, that of a control row {self.ceiling:.3g}"
        return f": the highest {what}, {highest:.3g}, does not stand out from the null"

    @property
    def rule_sentence(self) -> str:
        """The rule that flagged, in a sentence."""
        return (
            f"Flagged: {self.rule}." if self.flagged else f"No threshold, as nothing is flagged: {self.rule}."
        )

    def findings(self) -> list[str]:
        """Tested sentences about the result."""
        said: list[str] = []
        if not self.asked and len(self.flagged) > len(self.scores) / 2:
            said.append(
                "More than half of the rows are flagged: the data as a whole pushes towards harm, or it is "
                "unlike the control rows."
            )
        if abs(self.length_correlation) >= LENGTH_MATTERS and len(self.scores) >= LENGTH_ROWS:
            kind = "long" if self.length_correlation > 0 else "short"
            at_mean = "" if self.lengths is None else " at mean length"
            said.append(
                f"The score{at_mean} follows length: {kind} responses "
                f"rank higher (ρ = {self.length_correlation:+.2f}), so compare rows of like length."
            )
        curves = self.what_if
        if curves.get("status") == "measured":
            before, after = curves["before"]["safety"][-1], curves["after"]["safety"][-1]
            last = curves["before"]["steps"][-1]
            word = "lowers" if after < before else "does not lower"
            said.append(
                f"Dropping the flagged rows {word} the forecast rise of the safety loss at step {last}: "
                f"{before:+.3g} with them, {after:+.3g} without (nats/token, rollout)."
            )
            refused = [curves[key].get("refusals") for key in ("before", "after")]
            if all(refused):
                count, (kept, freed) = refused[0]["prompts"], refused
                told = [f"{round(share * count)}" for share in (kept["end"], freed["end"], kept["start"])]
                said.append(
                    f"Refusals forecast at the end of the plan: {told[0]} of {count} with the flagged rows, "
                    f"{told[1]} without, {told[2]} today."
                )
        elif curves:
            said.append(f"The forecast without the flagged rows was not measured: {curves['reason']}.")
        return said

    def as_json(self) -> dict[str, Any]:
        """Plain values; NaN where not measured."""
        return {
            "sentence": self.sentence,
            "score": self.score,
            "measure": None if self.score == "anchors" else self.measure,
            "method": self.method,
            "exact_rows": int(self.exact.sum()),
            "agreement": self.agreement,
            "rows": len(self.scores),
            "flagged": [int(row) for row in self.flagged],
            "flagged_share": len(self.flagged) / len(self.scores),
            "harm_share": self.share,
            "length_correlation": self.length_correlation,
            "rule": self.rule,
            "rule_sentence": self.rule_sentence,
            "threshold": self.threshold,
            "null": self.null_source,
            "null_rows": None if self.null is None else len(self.null),
            "highest_null": self.ceiling,
            "at_mean_length": self.lengths is not None,
            "excess_p": self.excess,
            "beyond_null": self.beyond,
            "unranked": self.unranked,
            "contrasted": self.contrasted,
            "points": [dataclasses.asdict(point) for point in self.points],
            "rise_reached": self.rise_reached,
            "planned_steps": self.planned_steps,
            "examples": [dict(row) for row in self.examples],
            "what_if": dict(self.what_if),
            "findings": self.findings(),
            "files": list(self.files),
            "files_missing": self.files_missing,
            "warnings": list(self.warnings),
        }
