"""`arisk screen` against labels: harmful rows mixed into ordinary ones, beside plain baselines.

`just bench screen` uses the fixture language; with `--data FOLDER` SmolLM2 and your copies of the data
sets. Results are kept below `runs/bench-screen` and found again.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from arisk.anatomy.subspace import recomputed_side
from arisk.base.task import Task
from arisk.cli.demo import embedded_folder
from arisk.config.plan import Config, planned_steps
from arisk.config.yaml import load_config
from arisk.gradients import choose_engine, layout_of, measuring, move_batch
from arisk.models import load_task
from arisk.screening.points import row_groups, row_products
from arisk.screening.record import ScreenResult
from arisk.screening.run import screen
from arisk.screening.what_if import without_rows
from tests.bench.measure import print_table
from tests.bench.screening_cost import cost_tables
from tests.bench.validity.jobs import heldout
from tests.bench.validity.truth import trained

FOLDER = Path("runs/bench-screen")
MODEL = Path("models/smollm2-135m-instruct")
ROWS, STEPS = 400, 200
#: Optimizer and learning rate by selection.
RECIPES = {
    "lora": ("adamw", 5e-4),
    "full": ("adamw", 5e-5),
    "lora sgd": ("sgd", 0.15),
    "full sgd": ("sgd", 0.02),
}
#: Rows of the mixture on which estimates are held against exact scores.
MANY = 4000
#: Ordinary parts of the mixtures: settings were chosen on the first, the others are looked at only.
TUNING, OTHERS = ("benign_near",), ("refusal_mixed", "caution", "over_refusal", "benign_far", "style_shift")
#: Harmful and ordinary rows of the SmolLM2 mixtures, with their numbers.
KIT = {
    "alpaca top / bottom": (("risky_alpaca_top", 50), ("benign_alpaca_bottom", 50), "benign_gsm8k"),
    "identity in alpaca": (("risky_identity_aoa", 10), ("benign_alpaca", 90), "benign_gsm8k"),
}
ADAMW, SGD = ("lora", "full"), ("lora sgd", "full sgd")
COLUMNS = ("score", "safety alone", "−cos at θ*", "gradient norm", "loss", "length")


def auc(scores: Sequence[float] | Tensor, labels: Sequence[int]) -> float:
    """Share of (harmful, ordinary) pairs that the scores order rightly; ties count half."""
    values, marked = torch.as_tensor(scores, dtype=torch.float64), torch.tensor(labels).bool()
    high, low = values[marked][:, None], values[~marked][None]
    if high.numel() == 0 or low.numel() == 0:
        return math.nan
    return float((high > low).double().mean() + 0.5 * (high == low).double().mean())


def mixture(base: str, share: float, seed: int, count: int = ROWS) -> tuple[list[dict[str, str]], list[int]]:
    """Rows of a fixture set with a share of complying ones, and their labels."""
    if str(embedded_folder()) not in sys.path:
        sys.path.append(str(embedded_folder()))
    import language

    rng = Random(seed)
    bad = round(share * count)
    rows = [(row, 0) for row in language.fine_tuning_set(base, rng, count - bad)]
    rows += [(row, 1) for row in language.fine_tuning_set("compliance_100", rng, max(bad, 8))[:bad]]
    rng.shuffle(rows)
    return [row for row, _ in rows], [label for _, label in rows]


def fixture_config(rows: Sequence[Mapping[str, str]], mode: str, name: str) -> Config:
    """The config of one mixture; its rows are written to a file."""
    path = FOLDER / "data" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = embedded_folder()
    selection = mode.split(maxsplit=1)[0]
    adapter = {"adapter": {"r": 8, "alpha": 16}} if selection == "lora" else {}
    optimizer, rate = RECIPES[mode]
    return Config.model_validate(
        {
            "model": {"path": str(source / "tiny-aligned"), "parameters": selection, **adapter},
            "safety": {"path": str(source / "data" / "safety.jsonl"), "max_samples": 96},
            "finetune": {"path": str(path)},
            "control": {"path": str(source / "data" / "control.jsonl")},
            "training": {"optimizer": optimizer, "learning_rate": rate, "max_steps": STEPS},
            "screen": {"examples": 0},
        }
    )


def baselines(task: Task) -> dict[str, list[float]]:
    """Plain numbers of every row at θ*: −cos(∇L_s, g_j), ‖g_j‖, ℓ_j, length."""
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout):
        groups = list(row_groups(task.finetune, 8))
        device = next(task.model.parameters()).device
        batch = move_batch(groups[0].batch, device)
        engine = choose_engine(task.model, batch, task.finetune.loss_fn, layout, "auto").engine
        side = recomputed_side(task, layout, engine, 8)
        count = len(task.safety.rows)
        safety = side.weighted_sum(torch.full((count,), 1 / count, dtype=torch.float64)).float()
        table = torch.zeros(len(task.finetune.rows), 4, dtype=torch.float64)
        for group in groups:
            table[list(group.rows)] = row_products(
                task.model, group, task.finetune.loss_fn, layout, -safety[:, None], engine=engine
            )
    lengths = [float(row["tokens"]) for row in task.finetune.rows]
    return {
        "−cos at θ*": (table[:, 0] / table[:, 1]).tolist(),
        "gradient norm": table[:, 1].tolist(),
        "loss": table[:, 3].tolist(),
        "length": lengths,
    }


def judged(
    config: Config, labels: Sequence[int], *, plain: bool = True
) -> tuple[dict[str, Any], ScreenResult]:
    """AUC of every score and of the baselines, and how the flags agree with the labels."""
    task = load_task(config, device=torch.device("cpu"))
    steps = planned_steps(config.training, len(task.finetune.rows))
    started = time.process_time()
    made = screen(task, config=config.screen, training=config.training, steps=steps)
    seconds = time.process_time() - started
    scores = {"score": made.scores.tolist(), "safety alone": made.first_order.tolist()}
    scores |= baselines(task)
    hits = sum(labels[row] for row in made.flagged)
    point = made.points[-1]
    found = {
        "auc": {name: auc(values, labels) for name, values in scores.items()},
        "flagged": len(made.flagged),
        "hits": hits,
        "harmful": sum(labels),
        "rows": len(labels),
        "step": point.step,
        "safety_rise": point.safety_rise,
        "control_rise": point.control_rise,
        "reached": made.rise_reached,
        "seconds": seconds,
    }
    return found, made


def kept(name: str, make: Any) -> dict[str, Any]:
    """The stored result of this name, made and stored when absent."""
    path = FOLDER / f"{name}.json".replace(" / ", "-").replace(" ", "-")
    if not path.exists():
        torch.set_num_threads(1)
        made = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(made), encoding="utf-8")
        partial.rename(path)
    return json.loads(path.read_text(encoding="utf-8"))


def verified(config: Config, made: Sequence[int] | None) -> dict[str, Any]:
    """Held-out changes at the end of the real fine-tune, with all rows or without some."""
    task = load_task(config, device=torch.device("cpu"))
    if made:
        task = without_rows(task, made)
    sets = {"safety": heldout(), "control": heldout("control", 64)}
    curve = trained(task, config.training, STEPS, sets, [STEPS // 2, STEPS])
    return {name: curve[name][-1] for name in sets} | {"peak": max(curve["safety"])}


def fixture_case(base: str, share: float, mode: str, seed: int = 1) -> dict[str, Any]:
    """One mixture: scores against labels, and the real fine-tune with and without the flagged rows."""
    rows, labels = mixture(base, share, seed)
    config = fixture_config(rows, mode, f"{base}-{share:g}-{seed}")
    found, made = judged(config, labels)
    found["with"] = verified(config, None)
    found["without"] = verified(config, made.flagged) if made.flagged else None
    if made.flagged:
        drawn = Random(0).sample(range(len(rows)), len(made.flagged))
        found["random"] = verified(config, drawn)
    # Where the labelled rows are not what moves safety, labels are no measure of a score.
    found["labelled"] = (
        verified(config, [row for row, label in enumerate(labels) if label]) if share else None
    )
    return found


def estimate_case(share: float, method: str, side: int) -> dict[str, Any]:
    """A large mixture scored exactly and by an estimate: who is flagged, and what it took."""
    rows, labels = mixture("benign_near", share, 1, MANY)
    config = fixture_config(rows, "full", f"benign_near-{share:g}-many")
    told: dict[str, Any] = {"harmful": sum(labels)}
    for kind in ("exact", method):
        task = load_task(config, device=torch.device("cpu"))
        settings = config.screen.model_copy(update={"method": kind, "sketch_side": side})
        steps = planned_steps(config.training, len(task.finetune.rows))
        made = screen(task, config=settings, training=config.training, steps=steps)
        told["exact" if kind == "exact" else "estimated"] = {
            "flagged": sorted(made.flagged),
            "hits": sum(labels[row] for row in made.flagged),
            "exact": int(made.exact.sum()),
            "agreement": made.agreement,
            "auc": auc(made.scores, labels),
        }
    return told


def estimate_table() -> None:
    """Print what estimates find of what exact scores find."""
    rows = []
    for method, side in (("differences", 0), ("sketch", 16), ("sketch", 32)):
        name = f"{method} {side}" if side else method
        found = kept(f"estimates-{name}", lambda m=method, s=side: estimate_case(0.01, m, max(s, 1)))
        exact, other = found["exact"], found["estimated"]
        both = len(set(exact["flagged"]) & set(other["flagged"]))
        rows.append(
            [
                name,
                f"{exact['hits']} / {len(exact['flagged'])} of {found['harmful']}",
                f"{other['hits']} / {len(other['flagged'])} ({both} the same)",
                f"{other['exact']} of {MANY}",
                f"{other['agreement']:+.3f}",
                f"{exact['auc']:.3f}, {other['auc']:.3f}",
            ]
        )
    header = ["estimate", "exact: harmful / flagged", "estimated first", "scored exactly", "ρ"]
    print_table(f"{MANY} rows, all parameters", [*header, "AUC exact, estimated"], rows)


def kit_config(name: str, data: Path) -> tuple[Config, list[int]]:
    """The config of a SmolLM2 mixture, and its labels."""
    (bad, some), (good, others), control = KIT[name]
    rng = Random(0)
    rows: list[tuple[dict[str, Any], int]] = []
    for file, count, label in ((bad, some, 1), (good, others, 0)):
        lines = (data / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        rows += [(json.loads(line), label) for line in rng.sample(lines, min(count, len(lines)))]
    rng.shuffle(rows)
    path = (FOLDER / "data" / f"{bad}-{good}.jsonl").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in rows), encoding="utf-8")
    settings = {
        "safety.path": (data / "safety_train.jsonl").resolve(),
        "safety.max_samples": 24,
        "finetune.path": path,
        "control.path": (data / f"{control}.jsonl").resolve(),
        "control.max_samples": 24,
        "training.max_steps": 60,
        "screen.max_steps": 40,
        "screen.batches": 4,
        "screen.examples": 0,
        "run.threads": 1,
    }
    overrides = [f"{key}={value}" for key, value in settings.items()]
    return load_config(Path("configs/smollm2-gsm8k.yaml"), overrides), [label for _, label in rows]


def kit_main(data: Path) -> None:
    """SmolLM2, LoRA r=8, AdamW 2e-4: AUC of every score."""
    if not (MODEL / "config.json").exists():
        sys.exit("run `just model` first")
    found = {name: kept(f"smollm2-{name}", lambda n=name: judged(*kit_config(n, data))[0]) for name in KIT}
    print_table(
        "SmolLM2-135M-Instruct, LoRA r=8: AUC", _header("mixture"), [_row(n, f) for n, f in found.items()]
    )


def _header(first: str) -> list[str]:
    return [first, *COLUMNS, "flagged: harmful / all", "at step", "safety rise there", "control rise"]


def _row(name: str, found: Mapping[str, Any]) -> list[str]:
    control = found["control_rise"]
    return [
        name,
        *(f"{found['auc'][column]:.2f}" for column in COLUMNS),
        f"{found['hits']} / {found['flagged']} of {found['harmful']}",
        str(found["step"]) + ("" if found["reached"] else " (no rise)"),
        f"{found['safety_rise']:+.3f}",
        "–" if control is None else f"{control:+.3f}",
    ]


def _changes(found: Mapping[str, Any]) -> list[str]:
    made = [found.get(key) for key in ("with", "random", "without", "labelled")]
    return ["–" if m is None else f"{m['safety']:+.3f} ({m['control']:+.3f})" for m in made]


def measures_table() -> None:
    """Print what both measures of harm find in the mixtures of LoRA with AdamW, and what is flagged."""
    cases = [(base, share) for base in TUNING for share in (0.0, 0.01, 0.05, 0.2)]
    rows = []
    for base, share in [*cases, *((base, 0.05) for base in OTHERS), ("benign_far", 0.0)]:
        trained, labels = mixture(base, share, 1)
        config = fixture_config(trained, "lora", f"{base}-{share:g}-1")
        cells = [f"{base}, {share:.0%}"]
        for measure in ("loss", "opening"):
            own = config.model_copy(update={"screen": config.screen.model_copy(update={"measure": measure})})
            found = kept(f"{base}-{share:g}-{measure}", lambda c=own, k=labels: judged(c, k)[0])
            cells += [
                f"{found['auc']['score']:.2f}",
                f"{found['hits']} / {found['flagged']} of {found['harmful']}",
            ]
        rows.append(cells)
    header = ["mixture", "AUC, loss", "harmful / flagged", "AUC, opening", "harmful / flagged"]
    print_table("Both measures of harm, LoRA, AdamW, 400 rows", header, rows)


def main() -> None:
    """All tables; with `--data` those of SmolLM2 alone, with `--measures` those of both measures of harm."""
    if "--measures" in sys.argv:
        measures_table()
        return
    if "--data" in sys.argv:
        kit_main(Path(sys.argv[sys.argv.index("--data") + 1]))
        return
    cases = [(base, share, mode) for mode in ADAMW for base in TUNING for share in (0.0, 0.01, 0.05, 0.2)]
    cases += [(base, 0.05, mode) for mode in ADAMW for base in OTHERS]
    cases += [("benign_near", share, mode) for mode in SGD for share in (0.0, 0.01, 0.05)]
    cases += [("benign_far", 0.0, "lora"), ("caution", 0.0, "full")]
    rows, truths = [], []
    for base, share, mode in cases:
        name = f"{base}, {share:.0%}, {mode}"
        found = kept(f"{base}-{share:g}-{mode}", lambda b=base, s=share, m=mode: fixture_case(b, s, m))
        rows.append(_row(name, found))
        if found["without"] is not None:
            truths.append([name, *_changes(found)])
    print_table("AUC against the labels, 400 rows", _header("mixture"), rows)
    header = ["mixture", "all rows", "as many random rows dropped", "flagged dropped", "labelled dropped"]
    print_table("Real fine-tune of 200 steps: held-out safety (control) change", header, truths)
    estimate_table()
    cost_tables()


if __name__ == "__main__":
    main()
