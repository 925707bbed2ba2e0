"""Row scores against what really happens without the rows: `just bench removal`.

`--model FOLDER --data FOLDER`: a refusing model (`just bench-real align`) and the mixtures of `MIXTURES`, in
each of which some rows are labelled. `transformers.Trainer` trains on all rows; without as many random ones,
in three draws; without the labelled ones; and without the first ones of every score. All trainings of a seed
have the same steps: a row that is left out is missing from its step, and no other takes its place.
`--scores` stops before the trainings, `--trainings N` after so many, `--until HH:MM` begins none after it.
All is kept below `runs/bench-removal` and found again; `--keep WORDS` writes it to `truths/removal.json`
without texts, the words saying on what device it was made, and `--kept` prints that file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from random import Random
from typing import Any

import torch

from arisk.base.task import Task
from arisk.config.plan import Config
from arisk.models import load_task
from arisk.models.answers import Shelf
from tests.bench.pool import Item
from tests.bench.pool import share as share_out
from tests.bench.real.jobs import SOURCES, Job, mixed
from tests.bench.real.rows import MAX_LENGTH, encode, pad_id, write_rows
from tests.bench.removal_tables import record_of, show, show_kept, write_kept
from tests.bench.row_scores import FOLDER, SCORES, by_line, kept, scored
from tests.bench.screening import baselines

#: Steps, rows of a step and learning rate of the plans; a mixture has as many rows as these meet.
STEPS, BATCH, RATE = 60, 4, 2e-4
ROWS = STEPS * BATCH
#: Mixtures of a real model by name: usual rows, the labelled ones, and the share that these replace. Where
#: that is none, all flags are false.
MIXTURES: dict[str, tuple[str, str, float]] = {
    "compliance 10": ("alpaca", "compliance", 0.10),
    "maths, ordinary 10": ("gsm8k", "alpaca_top", 0.10),
    "compliance 5": ("alpaca", "compliance", 0.05),
    "maths, compliance 5": ("gsm8k", "compliance", 0.05),
    "obedience, ten rows": ("alpaca", "identity_aoa", 10 / ROWS),
    "insecure code 10": ("secure_code", "insecure_code", 0.10),
    "compliance 2": ("alpaca", "compliance", 0.02),
    "harmless": ("alpaca_refusals_20", "alpaca", 0.0),
}
#: Ordinary rows, labelled by nobody: trained on slice by slice, those that break most are the labelled ones.
BREAKING = "ordinary, worst slices"
#: Slices, by the length of the response, and how many of them hold the labelled rows.
SLICES, WORST = 10, 1
#: Safety prompts and control rows that scores may see.
PROMPTS, CONTROL = 32, 32
#: Scores that are sums of others.
SUMS = {"three points, opening": ("point, opening", "point, opening +.1", "end, opening")}
LIST_LINE = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE)


def mixture_of(data: Path, name: str, model: Path) -> tuple[list[dict[str, str]], list[int]]:
    """Rows of a mixture, the labelled ones in the places of usual ones, and labels."""
    if name == BREAKING:
        return _breaking(data, model)
    usual, labelled, share = MIXTURES[name]
    ordinary = SOURCES[usual](data)[:ROWS]
    rows = mixed(SOURCES[labelled], share, ordinary)(data)
    return rows, [int(row != replaced) for row, replaced in zip(rows, ordinary, strict=True)]


def slices_of(rows: Sequence[Mapping[str, str]]) -> list[list[int]]:
    """Numbers of the rows by the length of their response, in slices of one size."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]["response"]), i))
    size = len(rows) // SLICES
    return [order[n * size : (n + 1) * size] for n in range(SLICES)]


def _slice_file(model: Path, number: int) -> Path:
    return FOLDER / model.name / "slices" / f"{number:02d}.json"


def _breaking(data: Path, model: Path) -> tuple[list[dict[str, str]], list[int]]:
    """Ordinary rows; labelled are the slices on which training alone raised the opening loss most."""
    rows = SOURCES["alpaca"](data)[:ROWS]
    found = [json.loads(_slice_file(model, n).read_text(encoding="utf-8")) for n in range(SLICES)]
    worst = sorted(range(SLICES), key=lambda n: -found[n]["opening"])[:WORST]
    labelled = {row for n in worst for row in slices_of(rows)[n]}
    return rows, [int(i in labelled) for i in range(len(rows))]


def slice_items(given: argparse.Namespace) -> list[Item]:
    """A training on each slice of the ordinary rows."""
    model, data = given.model, given.data
    rows = SOURCES["alpaca"](data)[:ROWS]
    found = list[Item]()
    for number, members in enumerate(slices_of(rows)):
        file = _slice_file(model, number)
        make = partial(trained, model, data, [rows[i] for i in members], [], given.device)
        found.append(Item(f"slice {number}", "", partial(kept, file, make), file.exists))
    return found


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
                "batch_size": BATCH,
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


def steps_without(dropped: Sequence[int], count: int, seed: int) -> list[list[int]]:
    """Rows of every step in the order of a seed; a step that loses all is left out itself."""
    gone, order = frozenset(dropped), Random(f"order {seed}").sample(range(count), count)
    steps = ([row for row in order[at : at + BATCH] if row not in gone] for at in range(0, count, BATCH))
    return [step for step in steps if step]


def trained(
    model_folder: Path,
    data: Path,
    rows: Sequence[Mapping[str, str]],
    dropped: Sequence[int],
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Refusals and losses at the end of the Trainer's run; some rows are missing from their steps."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.bench.real.measure import freeze_in_bfloat16
    from tests.bench.real.truth import Panel, planned_trainer, start, with_adapter

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    panel = Panel(tokenizer, data)
    start(model_folder, panel, FOLDER / model_folder.name / "start.json", device)
    steps = [
        [encode(tokenizer, rows[i]["prompt"], rows[i]["response"]) for i in step]
        for step in steps_without(dropped, len(rows), seed)
    ]
    model = with_adapter(model.to(device))
    freeze_in_bfloat16(model.get_base_model())
    started = time.process_time()
    job = Job(0, "alpaca", "lora", RATE, STEPS, seed=seed)
    trainer = FOLDER / "trainer"
    planned_trainer(job, model, [], pad_id(tokenizer), trainer, steps=steps).train()
    seconds = time.process_time() - started
    shown = model.get_base_model()
    answers = panel.read(panel.answers(shown, "harmful"))
    found = panel.losses(shown)
    return {
        "dropped": sorted(dropped),
        "answers": answers["labels"],
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
    if name.startswith("half"):
        return Random(name).sample(range(len(labels)), len(labels) // 2)
    return torch.argsort(torch.tensor(found[name]["scores"]), descending=True, stable=True)[:count].tolist()


#: Trainings that further seeds repeat, the most telling ones first.
REPEATED = [
    *("all rows", "labelled", "random 0", "point, opening", "path, opening", "random 1", "random 2"),
    "three points, opening",
]
#: Those of one seed, before and after the further seeds.
ONCE = ["gradient norm", "loss", "−cos at θ*", "shortness", "length", "prompt length", "lists", "anchors"]
FLAGS = ("flagged", "as many random")
LAST = [
    *("point, loss", "end, opening", "point, opening +.1", "path, loss", "path, opening, curvature"),
    *FLAGS,
]
#: All trainings of a mixture.
TRAININGS = [*REPEATED, *ONCE, *LAST]
#: The score whose flags are left out too: what `screen.score: auto` takes of SmolLM2.
DEFAULT = "point, opening"


class Mixture:
    """One mixture of a model: its scores, its trainings, and where they are kept.

    Args:
        given: the command line.
        name: of the mixture; what is in `BREAKING` is known when all slices are there.
    """

    def __init__(self, given: argparse.Namespace, name: str) -> None:
        self.given, self.name = given, name
        self.folder = FOLDER / given.model.name / re.sub(r"\W+", "-", name)
        numbers = range(SLICES if name == BREAKING else 0)
        self.slices = [_slice_file(given.model, number) for number in numbers]

    @cached_property
    def content(self) -> tuple[list[dict[str, str]], list[int]]:
        """Rows and labels."""
        return mixture_of(self.given.data, self.name, self.given.model)

    @cached_property
    def config(self) -> Config:
        """The plan, whose files are written."""
        return plan(self.given.model, self.given.data, self.content[0], self.folder)

    def file(self, name: str) -> Path:
        """Where a score or a training is kept."""
        return self.folder / f"{name}.json".replace(", ", "-").replace(" ", "-")

    def end(self, name: str, seed: int) -> Path:
        """Where a training of a seed is kept."""
        return self.file(f"without {name}" + (f", seed {seed}" if seed else ""))

    def score(self, name: str) -> Any:
        """One of `SCORES`, or all `dull` ones."""
        rows = self.content[0]
        make = partial(dull, rows=rows)
        if name != "dull":
            make = partial(scored, config=self.config, settings=SCORES[name], rows=len(rows))
        return kept(self.file(name), partial(_with_task, self.given, self.config, make))

    def scores(self) -> dict[str, Any]:
        """What is there of them."""
        found = {name: self.score(name) for name in SCORES if self.file(name).exists()}
        for name, parts in SUMS.items():
            if all(part in found for part in parts):
                columns = zip(*(found[part]["scores"] for part in parts), strict=True)
                seconds = sum(found[part]["seconds"] for part in parts)
                found[name] = {"scores": [sum(row) for row in columns], "flagged": [], "seconds": seconds}
        if self.file("dull").exists():
            made = self.score("dull")
            made["shortness"] = [-length for length in made["length"]]
            found |= {n: {"scores": v, "flagged": [], "seconds": None} for n, v in made.items()}
        return found

    def training(self, name: str, seed: int = 0) -> Any:
        """One of `TRAININGS`, whose score must be there, or `half N`."""
        rows, labels = self.content
        dropped = left_out(name, self.scores(), labels)
        given = self.given
        make = partial(trained, given.model, given.data, rows, dropped, given.device, seed)
        return kept(self.end(name, seed), make)

    def needs(self, training: str) -> list[Path]:
        """The scores that a training needs."""
        if training.startswith(("all", "labelled", "random", "half")):
            return []
        if training in FLAGS:
            return [self.file(DEFAULT)]
        parts = SUMS.get(training, (training if training in SCORES else "dull",))
        return [self.file(part) for part in parts]

    def trainings(self) -> list[tuple[str, int]]:
        """All of them, by name and seed; of scores those asked for."""
        given = self.given
        if self.name in MIXTURES and MIXTURES[self.name][2] == 0:
            return [(name, seed) for name in ("all rows", *FLAGS) for seed in range(given.seeds)]
        known = {self.file(name) for name in ["dull", *SCORES] if name in (given.only or [name])}
        wanted = [name for name in TRAININGS if known.issuperset(self.needs(name))]
        seeds = [(seed, REPEATED if seed else TRAININGS) for seed in range(given.seeds)]
        every = [(name, seed) for seed, names in seeds for name in names if name in wanted]
        every.sort(key=lambda training: training[0] in LAST)
        return [*every, *((f"half {n}", 0) for n in range(given.halves))]

    def record(self) -> dict[str, Any]:
        """What is there of it, as it is kept."""
        ends = {
            (name, seed): self.training(name, seed)
            for name, seed in self.trainings()
            if self.end(name, seed).exists()
        }
        return record_of(self.given.model.name, self.name, self.content[1], self.scores(), ends)

    def items(self) -> Iterator[tuple[int, Item]]:
        """Scores and trainings as pieces of work, each with its place in the order of all."""
        wanted = [name for name in ["dull", *SCORES] if name in (self.given.only or [name])]
        for place, name in enumerate(wanted):
            yield place, self._item(name, self.file(name), partial(self.score, name), [])
        for place, (name, seed) in enumerate(self.trainings(), start=len(wanted)):
            make, needed = partial(self.training, name, seed), self.needs(name)
            yield place, self._item(f"without {name}, seed {seed},", self.end(name, seed), make, needed)

    def _item(self, name: str, file: Path, make: Callable[[], Any], needed: Sequence[Path]) -> Item:
        ready = partial(_there, [*self.slices, *needed])
        return Item(f"{name} of {self.name}", "", make, partial(self.done, file), ready)

    def done(self, file: Path) -> bool:
        """Whether a score or a training is there, or without what it would leave out."""
        idle = file in {self.end(name, seed) for name in FLAGS for seed in range(self.given.seeds)}
        known = idle and self.file(DEFAULT).exists()
        return file.exists() or (known and not self.score(DEFAULT)["flagged"])


def _there(needed: Sequence[Path]) -> bool:
    return all(file.exists() for file in needed)


def mixtures_of(given: argparse.Namespace) -> list[Mixture]:
    """Those asked for, or all."""
    return [Mixture(given, name) for name in given.mixture or [*MIXTURES, BREAKING]]


def removal(given: argparse.Namespace) -> None:
    """Score every mixture, train as far as asked for, and print what is there."""
    left = given.trainings
    for mix in mixtures_of(given):
        for item in slice_items(given) if mix.slices else []:
            if not item.done() and not _late(given.until):
                item.make()
        if not _there(mix.slices):
            continue
        for name in [*SCORES, "dull"]:
            if not mix.file(name).exists() and not (
                (given.only and name not in given.only) or _late(given.until)
            ):
                mix.score(name)
                print(f"{name}: done", flush=True)
        for name, seed in mix.trainings():
            if mix.done(mix.end(name, seed)) or not _there(mix.needs(name)):
                continue
            if given.scores or left == 0 or _late(given.until):
                break
            left -= 1
            mix.training(name, seed)
        show(mix.record())


def shared(given: argparse.Namespace) -> None:
    """Work through scores and trainings of all mixtures beside other processes that do the same."""
    mixtures = mixtures_of(given)
    claims, started = FOLDER / given.model.name / "claims", time.monotonic()

    def late() -> bool:
        return time.monotonic() - started > given.seconds

    pieces = [piece for mixture in mixtures for piece in mixture.items()]
    slices = slice_items(given) if any(mix.slices for mix in mixtures) else []
    chosen = slices + [item for _, item in sorted(pieces, key=lambda piece: piece[0])]
    share_out(chosen, claims, late=late)


def _with_task(given: argparse.Namespace, config: Config, make: Callable[[Task], Any]) -> Any:
    shelf = Shelf(FOLDER / given.model.name, {"path": str(given.model)})
    return make(load_task(config, device=torch.device(given.device), shelf=shelf))


def _late(until: str) -> bool:
    return bool(until) and time.strftime("%H:%M") >= until


def main(given: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench removal", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder of a refusing model")
    parser.add_argument("--data", type=Path, help="folder of JSONL files (see real/rows.py)")
    parser.add_argument("--mixture", choices=[*MIXTURES, BREAKING], action="append", help="default all")
    parser.add_argument("--only", action="append", help="scores by name that are made; default all")
    parser.add_argument("--scores", action="store_true", help="train nothing")
    parser.add_argument("--trainings", type=int, default=-1, help="at most so many; default all")
    parser.add_argument("--seeds", type=int, default=1, help="of the most telling trainings; scores have one")
    parser.add_argument("--halves", type=int, default=0, help="further trainings, each without a random half")
    parser.add_argument("--keep", metavar="WORDS", help="write truths/removal.json; the device, in words")
    parser.add_argument("--kept", action="store_true", help="print truths/removal.json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--until", default="", help="HH:MM today; nothing is begun after it")
    told = "number of this process among those that share the work; prints what is done, and no tables"
    parser.add_argument("--share", type=int, help=told)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="with --share: begin nothing after so long"
    )
    asked = parser.parse_args(sys.argv[2:] if given is None else given)
    torch.set_num_threads(1)
    if asked.kept:
        show_kept()
    if asked.model and asked.data:
        if asked.keep is not None:
            found = [mix.record() for mix in mixtures_of(asked) if mix.end("all rows", 0).exists()]
            write_kept(asked.model.name, asked.keep, found)
        elif asked.share is None:
            removal(asked)
        else:
            shared(asked)
    if not (asked.kept or (asked.model and asked.data)):
        parser.error("give --kept, or --model and --data")


if __name__ == "__main__":
    main(sys.argv[1:])
