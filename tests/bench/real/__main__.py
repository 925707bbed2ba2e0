"""`just bench-real align | truths | merge …`: see each command's --help."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.bench.real.jobs import Job

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.real", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    align = commands.add_parser("align", help="make a model refuse")
    align.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    align.add_argument("--out", type=Path, required=True)
    align.add_argument("--data", type=Path, required=True, help="folder of JSONL files (see rows.py)")
    align.add_argument("--steps", type=int, default=120)
    align.add_argument("--seed", type=int, default=0)
    align.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    truths = commands.add_parser("truths", help="carry out jobs that are not in the cache yet")
    truths.add_argument(
        "--model", type=Path, required=True, help="folder of the aligned model; its name names the truths"
    )
    truths.add_argument("--data", type=Path, required=True)
    truths.add_argument(
        "--cache", type=Path, default=Path("models/truths"), help="one JSON a job, texts included"
    )
    truths.add_argument("--jobs", default="", help="numbers, as in 1-20,25; all by default")
    truths.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    truths.add_argument(
        "--until", default="", help="HH:MM today; a job that runs then stops at its next measured step"
    )
    told = "what arisk says of jobs beforehand, for the scorer"
    _plans(commands.add_parser("forecasts", help=told), Path("models/forecasts"))
    told = "overlap and the peer's numbers, once a data set and mode"
    _plans(commands.add_parser("geometry", help=told), Path("models/geometry"))
    told = "forecast protections on jobs (LoRA), and train the best two"
    guarded = commands.add_parser("protect", help=told)
    _plans(guarded, Path("models/protect"), "2")
    guarded.add_argument("--seeds", type=int, default=1)
    guarded.add_argument("--all", action="store_true", help="train every arm")
    told = (
        "as for `arisk guard`, for example guard.methods=[kl,alpha]; give these arms a --folder of their own"
    )
    guarded.add_argument(
        "--set", dest="settings", metavar="KEY=VALUE", action="append", default=[], help=told
    )
    told = "number of this process among those that share the arms; nothing is printed but what is done"
    guarded.add_argument("--share", type=int, help=told)
    guarded.add_argument(
        "--seconds", type=float, default=1e9, help="with --share: begin nothing after so long"
    )
    merge = commands.add_parser(
        "merge", help="write tests/bench/truths/MODEL.json from the cache, without texts"
    )
    merge.add_argument("--cache", type=Path, default=Path("models/truths"))
    done = commands.add_parser("protections", help="print tests/bench/truths/protections.json")
    done.add_argument("--keep", type=Path, help="write it first, from this folder of `protect`")
    done.add_argument("--device", default="", help="with --keep: where that was, in words")
    kept = commands.add_parser("rollouts", help="write tests/bench/truths/rollouts.json from the forecasts")
    kept.add_argument("--folder", type=Path, default=Path("models/forecasts"))
    commands.add_parser("publish", help="put the record of refusals into arisk/forecast/validity.json")
    read = commands.add_parser("read", help="print twenty answers of a job, for a person to count")
    read.add_argument("--cache", type=Path, default=Path("models/truths"))
    read.add_argument("--model", required=True)
    read.add_argument("--job", type=int, required=True)
    read.add_argument("--step", type=int, help="the last one by default")
    given = parser.parse_args()
    if given.command == "merge":
        from tests.bench.real.merge import merge as write

        for path in write(given.cache):
            print(path)
        return
    if given.command == "protections":
        from tests.bench.real.protections import keep, show

        if given.keep is not None:
            keep(given.keep, given.device)
        show()
        return
    if given.command == "rollouts":
        from tests.bench.real.rollouts import keep

        print(keep(given.folder), "rollouts")
        return
    if given.command == "publish":
        import torch

        from tests.bench.real.rollouts import publish
        from tests.bench.validity.readme import STORED

        torch.set_num_threads(1)
        publish(STORED)
        return
    if given.command == "read":
        from tests.bench.real.merge import twenty_answers

        print(twenty_answers(given.cache / given.model, given.job, given.step))
        return

    import torch

    torch.set_num_threads(1)
    if given.command == "align":
        from tests.bench.real.align import align as make

        options = {"steps": given.steps, "seed": given.seed, "device": given.device}
        print(make(given.model, given.data, given.out, **options))
        return
    from tests.bench.real.jobs import JOBS

    chosen = _numbers(given.jobs)
    jobs = [job for job in JOBS if not chosen or job.number in chosen]

    def late() -> bool:
        return bool(given.until) and time.strftime("%H:%M") >= given.until

    run = {"truths": _truths, "forecasts": _forecasts, "geometry": _geometry, "protect": _protections}
    run[given.command](given, jobs, late)


def _plans(parser: argparse.ArgumentParser, folder: Path, jobs: str = "") -> None:
    """What every command on jobs that keeps a folder per model is told."""
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=folder)
    parser.add_argument("--jobs", default=jobs, help=f"numbers, as in 1-20,25; {jobs or 'all'} by default")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--until", default="", help="HH:MM today; no job is begun after it")


def _truths(given: argparse.Namespace, jobs: Sequence[Job], late: Callable[[], bool]) -> None:
    from tests.bench.real.truth import run

    for job in jobs:
        if late():
            return
        print(time.strftime("%H:%M:%S"), job.name(), flush=True)
        result = run(job, given.model, given.data, given.cache / given.model.name, late, given.device)
        if result is None:
            print("  stopped, or another process is at it", flush=True)
            continue
        for point in result["points"]:
            counts = point.get("answers_harmful", {}).get("counts", "")
            kept = point["own_harmful"]["5"]["kept"]
            print(
                f"  step {point['step']:3d}  safety {point['safety_nll']:.3f}  kept {kept}  {counts}",
                flush=True,
            )


def _forecasts(given: argparse.Namespace, jobs: Sequence[Job], late: Callable[[], bool]) -> None:
    """Forecast the jobs and write `FORECASTS.json` of all that are there."""
    from tests.bench.real.forecast import collect, make
    from tests.bench.real.truth import write_json

    folder = given.folder / given.model.name
    for job in jobs:
        if late():
            break
        entry = make(job, given.model, given.data, folder, given.device)
        print(time.strftime("%H:%M:%S"), job.name(), entry, flush=True)
    write_json(folder / "FORECASTS.json", collect(folder, "arisk"))


def _geometry(given: argparse.Namespace, jobs: Sequence[Job], late: Callable[[], bool]) -> None:
    """Measure every data set and mode of the jobs, and write all that is there beside the truths."""
    from tests.bench.real.geometry import keep, measure

    for job in jobs:
        if late():
            break
        found = measure(job, given.model, given.data, given.folder / given.model.name, given.device)
        print(time.strftime("%H:%M:%S"), job.name(), found, flush=True)
    print(keep(given.folder), "data sets and modes")


def _protections(given: argparse.Namespace, jobs: Sequence[Job], late: Callable[[], bool]) -> None:
    from tests.bench.pool import share
    from tests.bench.real.protect import items, protect

    home = given.folder / given.model.name
    if given.share is not None:
        started = time.monotonic()
        options = {"every": given.all, "settings": given.settings}
        work = items(jobs, given.model, given.data, home, given.device, given.seeds, **options)
        first = jobs[given.share % len(jobs)].name()
        share(work, home / "claims", first=first, late=lambda: time.monotonic() - started > given.seconds)
        return
    for job in jobs:
        if late():
            return
        print(time.strftime("%H:%M:%S"), job.name(), flush=True)
        options = {"every": given.all, "settings": given.settings}
        protect(job, given.model, given.data, home / job.name(), given.device, given.seeds, **options)


def _numbers(text: str) -> set[int]:
    """Numbers of a list such as 1-20,25."""
    parts = [part.split("-") for part in text.split(",") if part]
    return {n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)}


if __name__ == "__main__":
    main()
