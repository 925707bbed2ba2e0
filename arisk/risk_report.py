"""What the Python API returns: every stage's record, with the peer package's names beside them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import Tensor

from arisk.anatomy.record import CollectResult, ScoreResult, SubspaceResult
from arisk.base.artifacts import (
    FORMAT_VERSION,
    RECORD_FILE,
    TENSORS_FILE,
    read_json,
    read_record,
    read_tensors,
    write_record,
    write_tensors,
    write_text,
)
from arisk.base.errors import ArtifactError, ConfigError
from arisk.engine.fingerprints import file_digest, stage_key
from arisk.forecast.record import ForecastResult, ProbeForecast, RefusalForecast, RolloutResult, Verdict
from arisk.models.judge import Judge
from arisk.peer import (
    CurvatureCouplingResult,
    InitialRiskScore,
    SafetyForecast,
    SensitivitySubspace,
    curvature_of,
)
from arisk.verification.record import Comparison, VerifyResult, compare

if TYPE_CHECKING:
    from arisk.report.page import Section
    from arisk.report.trackers import Logged

__all__ = ["RiskReport", "sections_of"]

#: Folder and class of each record of a saved report.
RECORDS: Mapping[str, type] = {
    "collected": CollectResult,
    "space": SubspaceResult,
    "scored": ScoreResult,
    "rollout": RolloutResult,
    "forecasted": ForecastResult,
}


#: Those that say why; a report without them is whole.
WHY = ("collected", "space", "scored")
#: Rows of tables of examples.
EXAMPLES = 25


@dataclass(frozen=True, repr=False)
class RiskReport:
    """What was found: the records of every stage, with the peer package's names beside them.

    Attributes:
        collected: per-sample safety gradients through their inner products; with `space` and `scored` None
            where `why` is off.
        space: the safety subspace.
        scored: how the planned update meets it.
        rollout: losses measured along the virtual run.
        forecasted: curves and verdict.
        status: "measured", or "skipped" with its `reason`: then nothing was looked at, the verdict is
            inconclusive, and no number means anything.
        basis: (P, k) orthonormal basis of the subspace, None where it was not kept.
    """

    collected: CollectResult | None
    space: SubspaceResult | None
    scored: ScoreResult | None
    rollout: RolloutResult
    forecasted: ForecastResult
    status: Literal["measured", "skipped"] = "measured"
    reason: str | None = None
    basis: Tensor | None = None

    @property
    def verdict(self) -> Verdict:
        """Level, sentence and reasons."""
        return self.forecasted.verdict

    @property
    def refusals(self) -> RefusalForecast | None:
        """Safety prompts refused `today` and `at_end`; its `status` may be "not_measured"."""
        return self.forecasted.refusals

    @property
    def probes(self) -> Sequence[ProbeForecast]:
        """What else the fine-tune costs; empty where no probe was given."""
        return self.forecasted.probes

    @property
    def warning(self) -> str:
        """The verdict in one line, level first; "skipped" where nothing was measured."""
        level = self.verdict.level if self.status == "measured" else self.status
        return f"{level}: {self.verdict.sentence}"

    @property
    def subspace(self) -> SensitivitySubspace:
        """The safety subspace, under both packages' names."""
        return SensitivitySubspace(_known(self.space), _known(self.collected), self.basis)

    @property
    def initial_risk(self) -> InitialRiskScore:
        """Overlap of the update with the safety subspace, with its nulls."""
        rate = float(self.forecasted.training["learning_rate"])
        scored = _known(self.scored)
        return InitialRiskScore(scored.overlap, rate * scored.update_norm)

    @property
    def curvature(self) -> CurvatureCouplingResult:
        """γ̂ and ε̂ of the Alignment Instability Condition."""
        return curvature_of(_known(self.scored), _known(self.space))

    @property
    def forecast(self) -> SafetyForecast:
        """Curves and verdict; `forecast.collapse_step`, `forecast.forecasters["local"]`."""
        return SafetyForecast(self.forecasted)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, as in the run directory's `summary.json`, and `status`, `reason`.

        NaN (not measured) is None.
        """
        from arisk.report.page import summary_json

        found = summary_json("arisk", self._sections(show_text=True))
        return _plain({"status": self.status, "reason": self.reason, "warning": self.warning, **found})

    def save(self, folder: str | Path) -> None:
        """Write safetensors and JSON into a folder, made if needed; `RiskReport.load` reads them.

        Raises:
            ArtifactError: the disk is full or the folder cannot be written.
        """
        folder = Path(folder)
        for name in self._kept():
            write_record(folder / name, getattr(self, name))
        write_tensors(folder / "basis.safetensors", {} if self.basis is None else {"basis": self.basis})
        head = {
            "format_version": FORMAT_VERSION,
            "type": "RiskReport",
            "status": self.status,
            "reason": self.reason,
            "warning": self.warning,
        }
        digests = {name: file_digest(folder / name) for name in _files(self._kept())}
        body = {**head, "files": digests, "digest": stage_key({**head, "files": digests})}
        write_text(folder / "report.json", json.dumps(body, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> RiskReport:
        """Read a saved report back.

        Raises:
            ArtifactError: a file is missing, changed since it was saved, of a newer format, or of something
                else.
        """
        folder = Path(folder)
        head = read_json(folder / "report.json")
        digest = head.pop("digest", None)
        if head.get("type") != "RiskReport" or head.get("status") not in ("measured", "skipped"):
            raise ArtifactError(
                "this is no saved report",
                where=str(folder / "report.json"),
                fix="give the folder that RiskReport.save wrote",
            )
        if digest != stage_key(head):
            raise _changed(folder / "report.json")
        there = [name for name in RECORDS if f"{name}/{RECORD_FILE}" in head["files"] or name not in WHY]
        for name in _files(there):
            if not (folder / name).is_file() or file_digest(folder / name) != head["files"].get(name):
                raise _changed(folder / name)
        records: dict[str, Any] = dict.fromkeys(WHY)
        records |= {name: read_record(folder / name, RECORDS[name]) for name in there}
        basis = read_tensors(folder / "basis.safetensors").get("basis")
        return cls(**records, status=head["status"], reason=head.get("reason"), basis=basis)

    def compare(self, measured: VerifyResult, judge: Judge | None = None) -> Comparison:
        """A real run of the same plan beside this forecast; `judge` labels answers, default the rule."""
        return compare(measured, self.forecasted, threshold=self.forecasted.threshold, judge=judge)

    def html(self, *, title: str = "arisk", show_text: bool = True, check: Comparison | None = None) -> str:
        """The report as one self-contained HTML page, with the real run where `check` has one."""
        from arisk.report.page import render

        return render(title, self._sections(show_text=show_text, check=check), self._provenance())

    def _sections(self, *, show_text: bool, check: Comparison | None = None) -> list[Section]:
        records = (self.collected, self.space, self.scored, self.forecasted, self.rollout)
        return sections_of(*records, show_text=show_text, max_examples=EXAMPLES, check=check)

    def _kept(self) -> list[str]:
        """Names of the records there are."""
        return [name for name in RECORDS if getattr(self, name) is not None]

    def to_wandb(self, run: Any = None) -> None:
        """Log level, numbers, curves and the page into a run of Weights & Biases (default: the active one).

        Raises:
            MissingExtraError: wandb is not installed.
        """
        from arisk.report.trackers import to_wandb

        to_wandb(self._logged(), run)

    def to_mlflow(self) -> None:
        """Log level, numbers, curves and the page into the active run of MLflow.

        Raises:
            MissingExtraError: mlflow is not installed.
        """
        from arisk.report.trackers import to_mlflow

        to_mlflow(self._logged())

    def to_tensorboard(self, folder: str | Path) -> Path:
        """Write level, numbers and curves for TensorBoard into a folder, and the page beside them.

        Raises:
            MissingExtraError: tensorboard is not installed.
        """
        from arisk.report.trackers import to_tensorboard

        return to_tensorboard(self._logged(), folder)

    def _logged(self) -> Logged:
        from arisk.report.trackers import Logged

        v, refusals = self.verdict, self.forecasted.refusals
        numbers = {
            "probability": v.probability,
            "collapse_step": v.collapse_step,
            "safe_steps": v.safe_steps,
            "planned_steps": v.horizon,
        }
        curves = {
            f"loss/{name}": (curve.steps, curve.median)
            for name, curve in self.forecasted.forecasters.items()
            if curve.status == "measured" and curve.kind == "forecast"
        }
        if refusals is not None and refusals.status == "measured":
            numbers |= {"refusals_before": refusals.today, "refusals_after": refusals.at_end[0]}
            for name in ("median", "lower", "upper"):
                curves[f"refused_share/{name}"] = (refusals.steps, getattr(refusals, name))
        for probe in self.probes:
            curves[f"probe/{probe.name}"] = (probe.steps, probe.median)
        known = {name: float(value) for name, value in numbers.items() if value is not None}
        level = v.level if self.status == "measured" else self.status
        return Logged({"level": level, "verdict": v.sentence}, known, curves, self.html())

    def _repr_html_(self) -> str:
        """The first screen, for notebooks; `html()` is the whole page."""
        from arisk.report.page import notebook

        return notebook(self._sections(show_text=False), self._provenance())

    def _provenance(self) -> dict[str, Any]:
        return {"source": "Python API", "task": self.rollout.task}

    def __repr__(self) -> str:
        return f"RiskReport({self.warning!r})"


def sections_of(
    collected: CollectResult | None,
    space: SubspaceResult | None,
    scored: ScoreResult | None,
    forecast: ForecastResult,
    measured: RolloutResult,
    *,
    show_text: bool,
    max_examples: int,
    check: Comparison | None = None,
) -> list[Section]:
    """What the report stage composes of a run directory, composed of records alone.

    Args:
        collected: safety side; with the next two None where it was not measured.
        space: safety subspace.
        scored: how the first update meets it.
        forecast: curves and verdict.
        measured: the rollout behind them.
        show_text: show prompts and responses, or only their numbers.
        max_examples: rows of tables of examples.
        check: a real run beside the forecast, where there is one.
    """
    from arisk.anatomy import page as anatomy_page
    from arisk.forecast import page as forecast_page
    from arisk.verification import page as verification_page

    truth = verification_page.section(check, forecast, show_text=show_text)
    answer = forecast_page.section(
        forecast,
        measured,
        real=truth.shared.get("real_run"),
        show_text=show_text,
        max_examples=max_examples,
        anatomy=scored is not None,
    )
    looked = bool(answer.shared["rows_told"])
    if collected is None or space is None or scored is None:
        return [answer, anatomy_page.left_out("the setting `why` was off", looked=looked), truth]
    why = anatomy_page.section(
        collected,
        space,
        scored,
        threshold=answer.shared["threshold"],
        specificity_told=answer.shared["specificity_told"],
        rows_told=looked,
        worth=answer.shared["worth"],
        show_text=show_text,
        max_examples=max_examples,
    )
    return [why, answer, truth]


R = TypeVar("R")


def _known(record: R | None) -> R:
    """A record that says why.

    Raises:
        ConfigError: it was not measured.
    """
    if record is None:
        raise ConfigError(
            "what lies behind the verdict was not measured", where="RiskReport", fix='set `why="full"`'
        )
    return record


def _files(names: Iterable[str]) -> list[str]:
    """Files of a saved report beside `report.json`."""
    parts = (RECORD_FILE, TENSORS_FILE)
    return [*(f"{name}/{part}" for name in names for part in parts), "basis.safetensors"]


def _changed(path: Path) -> ArtifactError:
    return ArtifactError(
        "the file is missing, or not what RiskReport.save wrote",
        where=str(path),
        fix="save the report again, or restore the folder",
    )


def _plain(value: Any) -> Any:
    """JSON values; NaN and infinities, which JSON lacks, become None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value
