"""Row scores against what really happens without the rows: `just bench removal`.

`--lds`: the embedded model. Thirty times a random half of the rows is left out of the planned batches and the
model really trained; a score is worth the rank correlation (LDS, Spearman) of what its sums foretell with
what came out, and the AUC of its ranking against the labels.

`--model FOLDER --data FOLDER`: a refusing model (`just bench-real align`) and the mixtures of `MIXTURES`, in
each of which some rows are labelled. `transformers.Trainer` trains on all rows; without as many random ones,
in three draws; without the labelled ones; and without the first ones of every score. `--scores` stops before
the trainings, `--trainings N` after so many, `--until HH:MM` begins none after it. All is kept below
`runs/bench-removal` and found again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import torch

from arisk.base.task import Task
from arisk.config.plan import Config, ScreenConfig, planned_steps
from arisk.geometry.statistics import rank_correlation
from arisk.gradients import layout_of, measuring
from arisk.models import load_task
from arisk.models.answers import Shelf
from arisk.screening import path
from arisk.screening.measure import measured_by
from arisk.screening.run import screen
from arisk.training.loop import PlannedRun, keeping_parameters, put
from arisk.training.panels import panel_of
from arisk.training.recipe import recipe_of
from tests.bench.measure import print_table
from tests.bench.pool import Item
from tests.bench.pool import share as share_out
from tests.bench.real.jobs import SOURCES, Job, mixed
from tests.bench.real.rows import MAX_LENGTH, encode, pad_id, write_rows
from tests.bench.screening import auc, baselines, fixture_config, mixture

FOLDER = Path("runs/bench-removal")
#: Half-data retrainings, rows and steps of the embedded model's case.
HALVES, LDS_ROWS, LDS_STEPS = 30, 480, 60
#: Mixtures of a real model by name: usual rows, the labelled ones, and the share that these replace.
MIXTURES: dict[str, tuple[str, str, float]] = {
    "compliance 10": ("alpaca", "compliance", 0.10),
    "maths, ordinary 10": ("gsm8k", "alpaca_top", 0.10),
    "compliance 5": ("alpaca", "compliance", 0.05),
    "maths, compliance 5": ("gsm8k", "compliance", 0.05),
    "obedience, ten rows": ("alpaca", "identity_aoa", 0.02),
    "insecure code 10": ("secure_code", "insecure_code", 0.10),
    "compliance 2": ("alpaca", "compliance", 0.02),
}
#: Rows of a mixture at most, steps and learning rate of the plans; draws of random rows.
ROWS, STEPS, RATE, DRAWS = 500, 60, 2e-4, 3
#: Safety prompts and control rows that scores may see.
PROMPTS, CONTROL = 32, 32
#: Scores by name: settings of `screen`.
SCORES: dict[str, dict[str, Any]] = {
    "path, opening": {"score": "path", "measure": "opening"},
    "path, loss": {"score": "path", "measure": "loss"},
    "point, opening": {"score": "point", "measure": "opening"},
    "point, loss": {"score": "point", "measure": "loss"},
    "anchors": {"score": "anchors"},
}
LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """The stored value of this file, made and stored when absent."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        made = make()
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(made), encoding="utf-8")
        part.replace(file)
    return json.loads(file.read_text(encoding="utf-8"))


def by_line(task: Task, values: Sequence[float], rows: int) -> list[float]:
    """Values of all rows of the file; rows that arisk leaves out, whose prompt is too long, rank last."""
    found = [min(values)] * rows
    for row, value in zip(task.finetune.rows, values, strict=True):
        found[int(row["line"]) - 1] = value
    return found


def scored(task: Task, config: Config, settings: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Scores of all rows of the file, what is flagged, and CPU seconds."""
    given = ScreenConfig.model_validate({**config.screen.model_dump(), "examples": 0, **settings})
    steps = planned_steps(config.training, len(task.finetune.rows))
    started = time.process_time()
    made = screen(task, config=given, training=config.training, steps=steps)
    return {
        "scores": by_line(task, made.scores.tolist(), rows),
        "flagged": [int(task.finetune.rows[row]["line"]) - 1 for row in made.flagged],
        "sentence": made.sentence,
        "excess": made.excess,
        "seconds": time.process_time() - started,
    }


# The embedded model


def lds() -> None:
    """Print what scores foretell of half-data retrainings, and how they rank the labelled rows."""
    for share, mode in ((0.05, "lora"),):
        folder = FOLDER / f"lds-{share:g}-{mode}"
        rows, labels = mixture("benign_near", share, 1, LDS_ROWS)
        config = fixture_config(rows, mode, f"removal-{share:g}")
        training = config.training.model_copy(update={"max_steps": LDS_STEPS})
        config = config.model_copy(update={"training": training})
        task = load_task(config, device=torch.device("cpu"))
        ends = [kept(folder / f"half-{n}.json", partial(_half, task, config, n)) for n in range(HALVES)]
        whole = kept(folder / "whole.json", partial(_half, task, config, None))
        found = {
            name: kept(folder / f"{name}.json", partial(scored, task, config, settings, len(rows)))
            for name, settings in SCORES.items()
        }
        found["path, opening, exact"] = kept(folder / "exact.json", partial(_exact, task, config, len(rows)))
        table = [_lds_row(name, made, ends, whole, labels) for name, made in found.items()]
        header = [
            "score",
            "LDS, opening",
            "LDS, safety loss",
            "AUC",
            "flagged (labelled)",
            "cost, plain runs",
        ]
        print_table(f"{LDS_ROWS} rows, {share:.0%} complying, {mode}, {HALVES} halves", header, table)


def _exact(task: Task, config: Config, rows: int) -> dict[str, Any]:
    """Path scores without smoothing."""
    usual = path.SMOOTHING
    path.SMOOTHING = 0.0
    try:
        return scored(task, config, SCORES["path, opening"], rows)
    finally:
        path.SMOOTHING = usual


def _half(task: Task, config: Config, number: int | None) -> dict[str, Any]:
    """Both measures after the plan with a random half of the rows left out of its batches."""
    count = len(task.finetune.rows)
    dropped = [] if number is None else Random(number).sample(range(count), count // 2)
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout), keeping_parameters(task.model, layout) as start:
        sets = {m: measured_by(task, ScreenConfig(measure=m)).task.safety for m in ("opening", "loss")}
        panels = {name: panel_of(samples, None, start[0].device) for name, samples in sets.items()}
        run = PlannedRun(task, layout, recipe_of(config.training, LDS_STEPS))
        put(run.parameters, start)
        run.stream.without = frozenset(dropped)
        started = time.process_time()
        for step in range(1, LDS_STEPS + 1):
            run.step(step)
        seconds = time.process_time() - started
        ends = {name: float(panel.losses(task.model).mean()) for name, panel in panels.items()}
    return {"dropped": sorted(dropped), "seconds": seconds, **ends}


def _lds_row(
    name: str,
    made: Mapping[str, Any],
    ends: Sequence[Mapping[str, Any]],
    whole: Mapping[str, Any],
    labels: Sequence[int],
) -> list[str]:
    scores = torch.tensor(made["scores"], dtype=torch.float64)
    told = torch.stack([-scores[torch.tensor(end["dropped"])].sum() for end in ends])
    real = {m: torch.tensor([end[m] for end in ends], dtype=torch.float64) for m in ("opening", "loss")}
    hits = sum(labels[row] for row in made["flagged"])
    return [
        name,
        *(f"{rank_correlation(told, real[m]):.2f}" for m in ("opening", "loss")),
        f"{auc(scores, labels):.3f}",
        f"{len(made['flagged'])} ({hits} of {sum(labels)})",
        f"{made['seconds'] / whole['seconds']:.1f}",
    ]


# A real model


def mixture_of(data: Path, name: str) -> tuple[list[dict[str, str]], list[int]]:
    """Rows of a mixture, the labelled ones in the places of usual ones, and labels."""
    usual, labelled, share = MIXTURES[name]
    ordinary = SOURCES[usual](data)[:ROWS]
    rows = mixed(SOURCES[labelled], share, ordinary)(data)
    return rows, [int(row != replaced) for row, replaced in zip(rows, ordinary, strict=True)]


def plan(model: Path, data: Path, rows: Sequence[Mapping[str, str]], folder: Path) -> Config:
    """The Trainer's plan in arisk's words; scores see even safety and control rows only."""
    from tests.bench.real.forecast import forecast_rows
    from tests.bench.real.rows import spread

    sets = forecast_rows(data)
    files = {
        "finetune": rows,
        "safety": spread(sets["safety"], PROMPTS),
        "control": spread(sets["control"], CONTROL),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, given in files.items():
        write_rows(folder / f"{name}.jsonl", given)
    return Config.model_validate(
        {
            "model": {"path": str(model), "adapter": {"r": 8, "alpha": 16}},
            **{
                name: {"path": str((folder / f"{name}.jsonl").resolve()), "max_length": MAX_LENGTH}
                for name in files
            },
            "training": {
                "learning_rate": RATE,
                "max_steps": STEPS,
                "batch_size": 4,
                "schedule": "linear",
                "precision": "bf16",
            },
            "screen": {"batches": 4, "control_samples": CONTROL, "max_steps": STEPS, "memory_gb": 3.0},
        }
    )


def dull(task: Task, rows: Sequence[Mapping[str, str]]) -> dict[str, list[float]]:
    """Numbers of a row that know nothing of safety, but for −cos at θ*."""
    return {
        **{name: by_line(task, values, len(rows)) for name, values in baselines(task).items()},
        "prompt length": [float(len(row["prompt"])) for row in rows],
        "lists": [len(LIST_LINE.findall(row["response"])) / max(1, len(row["response"])) for row in rows],
    }


def trained(
    model_folder: Path,
    data: Path,
    rows: Sequence[Mapping[str, str]],
    dropped: Sequence[int],
    device: str = "cpu",
) -> dict[str, Any]:
    """Refusals and losses at the end of the Trainer's run without some rows."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.bench.real.measure import freeze_in_bfloat16
    from tests.bench.real.truth import Panel, planned_trainer, start, with_adapter

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    panel = Panel(tokenizer, data)
    start(model_folder, panel, FOLDER / model_folder.name / "start.json", device)
    gone = frozenset(dropped)
    encoded = [encode(tokenizer, r["prompt"], r["response"]) for i, r in enumerate(rows) if i not in gone]
    model = with_adapter(model.to(device))
    freeze_in_bfloat16(model.get_base_model())
    started = time.process_time()
    job = Job(0, "alpaca", "lora", RATE, STEPS)
    planned_trainer(job, model, encoded, pad_id(tokenizer), FOLDER / "trainer").train()
    seconds = time.process_time() - started
    shown = model.get_base_model()
    answers = panel.read(panel.answers(shown, "harmful"))
    found = panel.losses(shown)
    return {
        "dropped": sorted(gone),
        "refused": answers["counts"]["refused"],
        "prompts": len(answers["labels"]),
        "safety": found["safety_nll"],
        "control": found["control_nll"],
        "opening": -found["own_harmful"]["3"]["log_prob"] / 3,
        "seconds": seconds,
    }


def left_out(name: str, found: Mapping[str, Mapping[str, Any]], labels: Sequence[int]) -> list[int]:
    """Rows that a training leaves out: none, labelled or random ones, a score's first or flagged ones."""
    count = sum(labels)
    if name == "flagged":
        return list(found[DEFAULT]["flagged"])
    if name == "as many random":
        return Random(name).sample(range(len(labels)), len(found[DEFAULT]["flagged"]))
    if name == "all rows":
        return []
    if name == "labelled":
        return [row for row, label in enumerate(labels) if label]
    if name.startswith("random"):
        # Not the seed that `mixed` draws the places of the labelled rows with.
        return Random(f"left out {name.split()[1]}").sample(range(len(labels)), count)
    return torch.argsort(torch.tensor(found[name]["scores"]), descending=True, stable=True)[:count].tolist()


#: Trainings of a mixture, the most telling ones first.
TRAININGS = [
    *("all rows", "labelled", "random 0", "point, opening", "path, opening", "random 1", "random 2"),
    *("gradient norm", "loss", "−cos at θ*", "anchors", "length", "prompt length", "lists"),
    *("point, loss", "path, loss", "flagged", "as many random"),
]
#: The score that `screen.score: auto` takes, whose flags are left out too.
DEFAULT = "point, opening"


class Mixture:
    """One mixture of a model: its scores, its trainings, and where they are kept."""

    def __init__(self, given: argparse.Namespace, name: str) -> None:
        self.given, self.name = given, name
        self.folder = FOLDER / given.model.name / re.sub(r"\W+", "-", name)
        self.rows, self.labels = mixture_of(given.data, name)
        self.config = plan(given.model, given.data, self.rows, self.folder)

    def file(self, name: str) -> Path:
        """Where a score or a training is kept."""
        return self.folder / f"{name}.json".replace(", ", "-").replace(" ", "-")

    def score(self, name: str) -> Any:
        """One of `SCORES`, or all `dull` ones."""
        make = partial(dull, rows=self.rows)
        if name != "dull":
            make = partial(scored, config=self.config, settings=SCORES[name], rows=len(self.rows))
        return kept(self.file(name), partial(_with_task, self.given, self.config, make))

    def scores(self) -> dict[str, Any]:
        """What is there of them."""
        found = {name: self.score(name) for name in SCORES if self.file(name).exists()}
        if self.file("dull").exists():
            made = self.score("dull")
            found |= {n: {"scores": v, "flagged": [], "seconds": None} for n, v in made.items()}
        return found

    def training(self, name: str) -> Any:
        """One of `TRAININGS`, whose score must be there."""
        dropped = left_out(name, self.scores(), self.labels)
        make = partial(trained, self.given.model, self.given.data, self.rows, dropped, self.given.device)
        return kept(self.file(f"without {name}"), make)

    def needs(self, training: str) -> Path | None:
        """The score that a training needs."""
        if training.startswith(("all", "labelled", "random")):
            return None
        if training in ("flagged", "as many random"):
            return self.file(DEFAULT)
        return self.file(training if training in SCORES else "dull")

    def items(self) -> list[tuple[str, Item]]:
        """Scores and trainings as pieces of work, by their names; of scores those asked for."""
        wanted = [name for name in ["dull", *SCORES] if name in (self.given.only or [name])]
        known = {None, *(self.file(name) for name in wanted)}
        scores = [(n, self.file(n), partial(self.score, n), None) for n in wanted]
        trainings = [
            (f"without {n}", self.file(f"without {n}"), partial(self.training, n), self.needs(n))
            for n in TRAININGS
            if self.needs(n) in known
        ]
        return [
            (name, Item(f"{name} of {self.name}", self.name, make, file.exists, partial(_there, needed)))
            for name, file, make, needed in [*scores, *trainings]
        ]


def _there(needed: Path | None) -> bool:
    return needed is None or needed.exists()


def removal(given: argparse.Namespace) -> None:
    """Score every mixture, train as far as asked for, and print what is there."""
    left = given.trainings
    for mix in [Mixture(given, name) for name in given.mixture or MIXTURES]:
        for name in [*SCORES, "dull"]:
            if not mix.file(name).exists() and not (
                (given.only and name not in given.only) or _late(given.until)
            ):
                mix.score(name)
                print(f"{name}: done", flush=True)
        found, ends = mix.scores(), dict[str, Any]()
        for name in TRAININGS:
            new, needed = not mix.file(f"without {name}").exists(), mix.needs(name)
            if new and (given.scores or left == 0 or _late(given.until) or not _there(needed)):
                continue
            left -= new
            ends[name] = mix.training(name)
        _show(mix.name, found, ends, mix.labels)


def shared(given: argparse.Namespace) -> None:
    """Work through scores and trainings of all mixtures beside other processes that do the same."""
    mixtures = [Mixture(given, name) for name in given.mixture or MIXTURES]
    pieces = [piece for mixture in mixtures for piece in mixture.items()]
    order = ["dull", *SCORES, *(f"without {name}" for name in TRAININGS)]
    chosen = [item for _, item in sorted(pieces, key=lambda piece: order.index(piece[0]))]
    started = time.monotonic()
    first = mixtures[given.share % len(mixtures)].name
    share_out(
        chosen,
        FOLDER / given.model.name / "claims",
        first=first,
        late=lambda: time.monotonic() - started > given.seconds,
    )


def _with_task(given: argparse.Namespace, config: Config, make: Callable[[Task], Any]) -> Any:
    shelf = Shelf(FOLDER / given.model.name, {"path": str(given.model)})
    return make(load_task(config, device=torch.device(given.device), shelf=shelf))


def _late(until: str) -> bool:
    return bool(until) and time.strftime("%H:%M") >= until


def _show(mix: str, found: Mapping[str, Any], ends: Mapping[str, Any], labels: Sequence[int]) -> None:
    """Refusals and losses by what was left out."""
    random = [end["refused"] for name, end in ends.items() if name.startswith("random")]
    usual = mean(random) if random else (ends["all rows"]["refused"] if "all rows" in ends else None)
    table = []
    for name in [*(n for n in ("all rows", "labelled") if n in ends), *found]:
        end, made = ends.get(name), found.get(name)
        table.append(
            [
                name,
                "–" if made is None else f"{auc(made['scores'], labels):.2f}",
                "–" if made is None else _flags(made, labels),
                "–" if end is None else f"{end['refused']} of {end['prompts']}",
                "–" if end is None or usual is None else f"{end['refused'] - usual:+.0f}",
                "–" if end is None else f"{end['opening']:.3f}",
                "–" if end is None else f"{end['control']:.3f}",
                "–" if made is None or made["seconds"] is None else f"{made['seconds']:.0f} s",
            ]
        )
    for name in ("flagged", "as many random"):
        if name in ends:
            end, rows = ends[name], len(ends[name]["dropped"])
            cells = [
                f"{end['refused']} of {end['prompts']}",
                "–" if usual is None else f"{end['refused'] - usual:+.0f}",
            ]
            numbers = [f"{end['opening']:.3f}", f"{end['control']:.3f}"]
            table.append([f"{name}, {rows} rows", "–", "–", *cells, *numbers, "–"])
    if random:
        drawn = [end for name, end in ends.items() if name.startswith("random")]
        means = [f"{mean(end[key] for end in drawn):.3f}" for key in ("opening", "control")]
        table.append(["random", "–", "–", ", ".join(map(str, random)), "0", *means, "–"])
    header = [
        "left out",
        "AUC",
        "flagged (labelled)",
        "refusals",
        "more than random",
        "opening",
        "control loss",
        "CPU time of the score",
    ]
    print_table(f"{mix}: {sum(labels)} of {len(labels)} rows are labelled", header, table)


def _flags(made: Mapping[str, Any], labels: Sequence[int]) -> str:
    return f"{len(made['flagged'])} ({sum(labels[row] for row in made['flagged'])} of {sum(labels)})"


def main(given: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench removal", description=__doc__)
    parser.add_argument("--lds", action="store_true", help="the embedded model, half-data retrainings")
    parser.add_argument("--model", type=Path, help="folder of a refusing model")
    parser.add_argument("--data", type=Path, help="folder of JSONL files (see real/rows.py)")
    parser.add_argument("--mixture", choices=MIXTURES, action="append", help="default all")
    parser.add_argument("--only", action="append", help="scores by name that are made; default all")
    parser.add_argument("--scores", action="store_true", help="train nothing")
    parser.add_argument("--trainings", type=int, default=-1, help="at most so many; default all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--until", default="", help="HH:MM today; nothing is begun after it")
    told = "number of this process among those that share the work; prints what is done, and no tables"
    parser.add_argument("--share", type=int, help=told)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="with --share: begin nothing after so long"
    )
    asked = parser.parse_args(sys.argv[2:] if given is None else given)
    torch.set_num_threads(1)
    if asked.lds:
        lds()
    if asked.model and asked.data:
        removal(asked) if asked.share is None else shared(asked)
    if not asked.lds and not (asked.model and asked.data):
        parser.error("give --lds, or --model and --data")


if __name__ == "__main__":
    main(sys.argv[1:])
