"""What has to be computed for the validity tables, and two processes that do it; resumable by file."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

from tests.bench.validity.jobs import FRESH, LOW, REPORT, TUNE, Job, long_jobs, standard_jobs
from tests.bench.validity.predict import ABLATIONS, ablated, forecasts, rolled_out
from tests.bench.validity.truth import cached, kept_or_real, real_run

#: Data sets by their part in the benchmark.
SETS = {"tune": TUNE, "report": REPORT, "fresh": FRESH, "low": LOW}
#: The subset of `--quick`, and the sets on which parts of the rollout are taken away.
QUICK = ("benign_far", "obedience", "compliance_005")
ABLATED = ("benign_far", "obedience", "compliance_001")

Item = tuple[str, Job]


def ablation_jobs() -> list[Job]:
    """AdamW at both rates, in both modes, on three data sets."""
    return [job for job in standard_jobs(ABLATED) if job.optimizer == "adamw"]


def items(*, quick: bool) -> list[Item]:
    """Everything to be computed, the most important first."""
    if quick:
        jobs = [job for job in standard_jobs(QUICK) if job.learning_rate in (0.02, 2e-4, 0.15, 2e-3)]
        return [(kind, job) for job in jobs for kind in ("truth", "rollout", "forecast")]
    sets = {name: standard_jobs(jobs) for name, jobs in SETS.items()}
    kinds: list[tuple[str, Iterable[Job]]] = [
        (kind, jobs) for jobs in sets.values() for kind in ("truth", "rollout", "forecast")
    ]
    kinds += [("truth", long_jobs()), ("rollout", long_jobs()), ("forecast", long_jobs())]
    kinds.append(("truth", [replace(job, seed=1) for job in sets["report"]]))
    kinds += [(f"ablation/{name}", ablation_jobs()) for name in ABLATIONS]
    return [(kind, job) for kind, jobs in kinds for job in jobs]


def compute(kind: str, job: Job, folder: Path, anew: bool = False) -> None:
    """One item, kept as a file.

    Args:
        kind: of item.
        job: the plan.
        folder: where results are kept.
        anew: train really, whatever has been kept of earlier runs.
    """
    if kind == "truth":
        cached(kind, job, folder, real_run if anew else kept_or_real)
    elif kind == "forecast":
        cached(kind, job, folder, forecasts)
    elif kind == "rollout":
        cached(kind, job, folder, rolled_out)
    else:
        name = kind.removeprefix("ablation/")
        cached(kind, job, folder, lambda j, f: ablated(j, f, name))


def compute_all(work: Sequence[Item], folder: Path, *, workers: int, anew: bool = False) -> list[str]:
    """Compute what is not there yet; returns a line for every item that failed."""
    left = [(kind, job) for kind, job in work if not (folder / kind / f"{job.name}.json").exists()]
    print(f"{len(work) - len(left)} of {len(work)} results are there, {len(left)} to compute", flush=True)
    failed: list[str] = []
    context = multiprocessing.get_context("spawn")
    # One thread each: two single-threaded jobs beat one job on two threads at this model's size.
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = {pool.submit(compute, kind, job, folder, anew): (kind, job) for kind, job in left}
        for number, future in enumerate(as_completed(futures), 1):
            kind, job = futures[future]
            error = future.exception()
            if error is not None:
                failed.append(f"{kind} {job.name}: {error}")
                traceback.print_exception(error)
            spent = (time.monotonic() - started) / 60
            print(f"[{spent:5.1f} min] {number}/{len(left)} {kind} {job.name}", flush=True)
    return failed
