"""What trainings without some rows came to: kept as numbers, and printed.

A record holds one letter a prompt and three losses of every training, and of every score how it ranks and
flags the labelled rows. The opening is the mean loss of the first three tokens that the aligned model itself
says to the truth's prompts, smaller is better; what labels or a score do is how far it lies below the mean of
trainings without as many random rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch

from arisk.geometry.statistics import rank_correlation
from tests.bench.measure import markdown_table, print_table
from tests.bench.real.merge import TRUTHS
from tests.bench.screening import auc

KEPT = TRUTHS / "removal.json"
#: The page with the block of tables, and its ends.
README = TRUTHS.parent / "README.md"
BEGIN, END = "<!-- removal: begin -->\n", "<!-- removal: end -->\n"
#: Scores that know the model's refusals, and those that stand beside them.
SCORES = ("point, opening", "path, opening")
DULL = ("gradient norm", "loss", "−cos at θ*", "shortness", "length", "prompt length", "lists", "anchors")
#: Share of the labels' effect that a score should reach.
REACHED = 0.8
#: Letter of a refusal.
REFUSED = "r"
#: Trainings without a random half that tell anything of ranks.
HALVES = 10

Record = dict[str, Any]


def record_of(
    model: str,
    mixture: str,
    labels: Sequence[int],
    scores: Mapping[str, Mapping[str, Any]],
    ends: Mapping[tuple[str, int], Mapping[str, Any]],
) -> Record:
    """What is kept of a mixture.

    Args:
        model: name of its folder.
        mixture: its name.
        labels: of all rows.
        scores: by name: `scores` of all rows, how many of them are really `scored` (others rank last), rows
            `flagged`, CPU `seconds`.
        ends: by what was left out and seed: rows `dropped`, `answers`, losses.
    """
    halves = [end for (name, _), end in ends.items() if name.startswith("half")]
    return {
        "model": model,
        "mixture": mixture,
        "rows": len(labels),
        "labelled": sum(labels),
        "scores": {
            name: {
                "auc": round(auc(made["scores"], labels), 4) if any(labels) else None,
                "scored": made.get("scored"),
                "flagged": len(made["flagged"]),
                "flagged_labelled": sum(labels[row] for row in made["flagged"]),
                "first_labelled": _first_labelled(made["scores"], labels),
                "cpu_seconds": None if made["seconds"] is None else round(made["seconds"], 1),
                "lds": None if len(halves) < HALVES else round(_lds(made["scores"], halves), 3),
            }
            for name, made in scores.items()
        },
        "trainings": [
            {
                "left_out": name,
                "seed": seed,
                "rows": len(end["dropped"]),
                "answers": end["answers"],
                **{key: round(end[key], 4) for key in ("opening", "safety", "control")},
                "cpu_seconds": round(end["seconds"], 1),
            }
            for (name, seed), end in ends.items()
        ],
    }


def _first_labelled(scores: Sequence[float], labels: Sequence[int]) -> int:
    """Labelled rows among the first ones, as many as are labelled."""
    order = torch.argsort(torch.tensor(scores), descending=True, stable=True)
    return sum(labels[row] for row in order[: sum(labels)].tolist())


def _lds(scores: Sequence[float], halves: Sequence[Mapping[str, Any]]) -> float:
    """Rank correlation of what a score foretells of the halves' opening losses with these."""
    given = torch.tensor(scores, dtype=torch.float64)
    told = torch.stack([-given[torch.tensor(end["dropped"])].sum() for end in halves])
    return rank_correlation(told, torch.tensor([end["opening"] for end in halves], dtype=torch.float64))


def write_kept(model: str, device: str, records: Sequence[Record]) -> None:
    """Put records into the file, in place of the same mixtures of this model, and tables into the page."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))["removal"] if KEPT.exists() else []
    new = {record["mixture"] for record in records}
    kept = [record for record in kept if record["model"] != model or record["mixture"] not in new]
    kept += [{"device": device, **record} for record in records]
    lines = ",\n".join(json.dumps(record, separators=(",", ":"), ensure_ascii=False) for record in kept)
    KEPT.write_text(f'{{"removal":[\n{lines}\n]}}\n', encoding="utf-8")
    page = README.read_text(encoding="utf-8")
    start, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    README.write_text(page[:start] + block(kept) + page[end:], encoding="utf-8")


class Removal:
    """A record: its trainings by what was left out.

    Args:
        record: as `record_of` made it.
    """

    def __init__(self, record: Record) -> None:
        self.record = record
        self.name = f"{record['model']}, {record['mixture']}"
        self.runs: dict[str, list[Record]] = {}
        for run in record["trainings"]:
            self.runs.setdefault(run["left_out"], []).append(run)

    @property
    def random(self) -> list[Record]:
        """Trainings without as many random rows as are labelled."""
        return [run for name, runs in self.runs.items() if name.startswith("random") for run in runs]

    def refused(self, name: str) -> list[int]:
        """Refusals by seed."""
        return [run["answers"].count(REFUSED) for run in self.runs[name]]

    def _than_random(self, runs: Sequence[Record], value: Callable[[Record], float]) -> float:
        """A value without random rows minus that of these trainings, mean over their seeds."""
        return mean(mean(map(value, self._draws(run))) - value(run) for run in runs if self._draws(run))

    def _draws(self, run: Record) -> list[Record]:
        """Trainings of the same seed without random rows."""
        return [one for one in self.random if one["seed"] == run["seed"]]

    def more(self, name: str) -> float:
        """Refusals more than without random rows of the same seed, mean over seeds."""
        return -self._than_random(self.runs[name], lambda run: run["answers"].count(REFUSED))

    def effect(self, name: str) -> float:
        """How far the opening loss lies below that without random rows (nats), mean over seeds."""
        return self._than_random(self.runs[name], lambda run: run["opening"])

    def error(self, name: str) -> float:
        """Standard error of that, from how far draws of random rows lie apart within a seed."""
        seeds = [[one["opening"] for one in self._draws(run)] for run in self.runs[name]]
        seeds = [draws for draws in seeds if draws]
        freedom = sum(len(draws) - 1 for draws in seeds)
        if not freedom:
            return math.nan
        apart = sum((loss - mean(draws)) ** 2 for draws in seeds for loss in draws) / freedom
        return math.sqrt(apart * sum(1 + 1 / len(draws) for draws in seeds)) / len(seeds)

    def labels_tell(self) -> bool:
        """Whether the labels' effect is twice its error or more."""
        return self.effect("labelled") >= 2 * self.error("labelled")

    def reached(self, name: str) -> float:
        """The effect as a share of the labels' in the same seeds."""
        seeds = {run["seed"] for run in self.runs[name]}
        beside = [run for run in self.runs["labelled"] if run["seed"] in seeds]
        return self.effect(name) / self._than_random(beside, lambda run: run["opening"])

    def complete(self) -> bool:
        """Whether there is what effects are measured against."""
        return bool(self.random) and "labelled" in self.runs and "all rows" in self.runs


def show(record: Record) -> None:
    """All that is there of a mixture."""
    held, rows = Removal(record), list[list[str]]()
    listed = [name for name in ("all rows", "labelled") if name in held.runs]
    for name in [*listed, *record["scores"], *(n for n in ("flagged", "as many random") if n in held.runs)]:
        rows.append([name, *_ranks(record, name), *_came_to(held, name), _seconds(record, name)])
    if held.random:
        counts = ", ".join(str(run["answers"].count(REFUSED)) for run in held.random)
        losses = (f"{mean(run[key] for run in held.random):.3f}" for key in ("opening", "control"))
        rows.append(["random", "–", "–", "–", "–", counts, "0", *losses, "–"])
    header = ["left out", "AUC", "LDS", "flagged (labelled)", "labelled among the first", "refusals, by seed"]
    header += ["more than random", "opening", "control loss", "CPU time of the score"]
    print_table(f"{held.name}: {record['labelled']} of {record['rows']} rows are labelled", header, rows)


def _ranks(record: Record, name: str) -> list[str]:
    made = record["scores"].get(name)
    if made is None:
        return ["–"] * 4
    lds = "–" if made["lds"] is None else f"{made['lds']:.2f}"
    flags = f"{made['flagged']} ({made['flagged_labelled']})"
    rank = "–" if made["auc"] is None else f"{made['auc']:.2f}"
    return [rank, lds, flags, str(made["first_labelled"])]


def _came_to(held: Removal, name: str) -> list[str]:
    if name not in held.runs:
        return ["–"] * 4
    runs = held.runs[name]
    return [
        ", ".join(map(str, held.refused(name))),
        f"{held.more(name):+.1f}" if held.random else "–",
        *(f"{mean(run[key] for run in runs):.3f}" for key in ("opening", "control")),
    ]


def _seconds(record: Record, name: str) -> str:
    seconds = record["scores"].get(name, {}).get("cpu_seconds")
    return "–" if seconds is None else f"{seconds:.0f} s"


def show_kept() -> None:
    """The tables of the page, on how many mixtures each score did as much as labels, and each of these."""
    records = json.loads(KEPT.read_text(encoding="utf-8"))["removal"]
    held = [one for one in map(Removal, records) if one.complete()]
    names = list(dict.fromkeys(name for one in held for name in one.record["scores"]))
    print(block(records))
    telling = [one for one in held if one.labels_tell()]
    for name in names:
        with_it = [one for one in telling if name in one.runs]
        count = sum(one.reached(name) >= REACHED for one in with_it)
        print(
            f"{name}: {REACHED:.0%} of the labels' effect on {count} of {len(with_it)} where these have one"
        )
    for record in records:
        print(f"\nOn {record['device']}:")
        show(record)


def block(records: Sequence[Record]) -> str:
    """The tables of the page, from what is kept alone."""
    held = [one for one in map(Removal, records) if one.complete()]
    header = ["mixture", "all rows", "without random ones", "without the labelled", "without point's first"]
    came = markdown_table(
        [*header, "without path's first"],
        [
            [one.name, _cell(one.runs["all rows"]), _cell(one.random)]
            + [_cell(one.runs.get(name)) for name in ("labelled", *SCORES)]
            for one in held
        ],
    )
    header = ["mixture", "labelled", "AUC: point, path", "labels' effect", "share reached: point, path"]
    worth = markdown_table(
        [*header, "refusals more than random: labelled, point, path"], [_worth(o) for o in held]
    )
    flags = markdown_table(
        ["mixture", "flagged (labelled)", "without these", "without as many random ones"],
        [_flags(one) for one in map(Removal, records) if SCORES[0] in one.record["scores"]],
    )
    dull = markdown_table(
        ["without the first by", *(one.name for one in held if DULL[0] in one.runs)],
        [[name, *(_beside(one, name) for one in held if DULL[0] in one.runs)] for name in DULL],
    )
    return "\n".join([came, worth, flags, dull])


def _cell(runs: Sequence[Record] | None) -> str:
    """Refusals by training, and the mean opening loss."""
    if not runs:
        return "–"
    counts = ", ".join(str(run["answers"].count(REFUSED)) for run in runs)
    return f"{counts} · {mean(run['opening'] for run in runs):.3f}"


def _worth(one: Removal) -> list[str]:
    ranks = ", ".join(_number(one.record["scores"].get(name, {}).get("auc")) for name in SCORES)
    there = [name for name in SCORES if name in one.runs]
    shares = ", ".join(f"{one.reached(name):.2f}" for name in there) if one.labels_tell() else "–"
    more = ", ".join(f"{one.more(name):+.1f}" for name in ("labelled", *there))
    effect = f"{one.effect('labelled'):.3f} ± {one.error('labelled'):.3f}"
    return [one.name, f"{one.record['labelled']} of {one.record['rows']}", ranks, effect, shares, more]


def _flags(one: Removal) -> list[str]:
    made = one.record["scores"][SCORES[0]]
    found = f"{made['flagged']} ({made['flagged_labelled']}) of {made['scored']}"
    return [one.name, found, *(_cell(one.runs.get(name)) for name in ("flagged", "as many random"))]


def _beside(one: Removal, name: str) -> str:
    rank = _number(one.record["scores"].get(name, {}).get("auc"))
    return f"{_cell(one.runs.get(name))}, AUC {rank}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
