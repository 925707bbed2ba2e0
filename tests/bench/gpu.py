"""arisk on a GPU: the numbers of a CPU, the speed of plain passes, the memory that `check` predicts.

`python -m tests.bench gpu` takes at most ten minutes and reaches nothing. Its tables: the embedded model on
the device beside the CPU; a random Llama of 0.13B and of 1B parameters in bf16 with LoRA, every stage against
plain forward and backward passes; peak memory on the device against what `check` predicts. `--device cpu
--small` runs the same on a CPU with a small random Llama, so that the script is tested where no GPU is.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from arisk.anatomy.collect import collect
from arisk.anatomy.record import CollectResult, ScoreResult
from arisk.base.artifacts import read_record
from arisk.base.task import SampleSet, Task
from arisk.base.terminal import StageDisplay
from arisk.catalogue import catalogue
from arisk.cli.demo import demo_config
from arisk.config.plan import AdapterConfig, Config, TrainingConfig
from arisk.config.sections import CollectConfig, RolloutConfig, ScreenConfig
from arisk.cost.estimate import calibrate
from arisk.engine.run import run_stages
from arisk.engine.stage import CostScene, cost_of, forward_tokens
from arisk.forecast.record import RolloutResult
from arisk.forecast.rollout import rollout
from arisk.gradients import layout_of, measuring
from arisk.models.losses import per_sample_nll
from arisk.models.selection import attach_adapter, lora_pairs, select_parameters
from arisk.screening.run import screen
from arisk.training.loop import PlannedRun, follow, keeping_parameters
from arisk.training.recipe import recipe_of
from tests.bench.gradients import batches
from tests.bench.measure import print_table

#: Name → vocabulary, width, inner width, layers, heads.
SIZES = {
    "small": (512, 64, 128, 2, 4),
    "0.13B": (32_000, 768, 2048, 12, 12),
    "1B": (32_000, 2048, 5632, 20, 32),
}
#: Rows of each data set and of a batch, optimizer steps of the plan, those that are timed alone.
SAFETY, FINETUNE, BATCH, STEPS, TIMED = 32, 64, 8, 40, 10
#: Largest difference from the CPU, over the largest number of the tensor: float32 sums in another order.
TOLERANCE = 2e-3
DEMO = {
    "safety": {"max_samples": 16},
    "control": {"max_samples": 16},
    "training": {"max_steps": 30, "batch_size": 4},
    "behaviour": {"prompts": 8, "ordinary_prompts": 4, "tokens": 8},
    "rollout": {"segments": 2, "carry_out": False},
    "score": {"batches": 2, "hvp_batches": 1, "krylov_dim": 3, "nulls": 9, "probe_points": 2, "examples": 8},
}


def main() -> None:
    """Print the tables as they are measured."""
    given = sys.argv[sys.argv.index("--device") + 1] if "--device" in sys.argv else "cuda"
    if given.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no GPU here; --device cpu --small runs the script on a CPU")
    device, small = torch.device(given), "--small" in sys.argv
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {name}", flush=True)
    alike = _same_numbers(device)
    sizes = ["small"] if small else ["0.13B", "1B"]
    for size in sizes:
        _speed(size, device)
    if not alike:
        sys.exit(f"records differ from those of the CPU by more than {TOLERANCE:g}")


def _same_numbers(device: torch.device) -> bool:
    """Records of the embedded model on the device beside those on the CPU."""
    with tempfile.TemporaryDirectory() as name:
        found = [_records(where, Path(name) / f"{i}") for i, where in enumerate(("cpu", str(device)))]
    rows: list[list[str]] = []
    worst = 0.0
    for key, one in found[0].items():
        other = found[1][key]
        off = float((one - other).abs().max()) / max(float(one.abs().max()), 1e-12)
        worst = max(worst, off)
        rows.append([key, f"{off:.1e}", "yes" if off <= TOLERANCE else "NO"])
    print_table(
        f"the embedded model, {device} against cpu, float32",
        ["record", "largest difference / largest number", f"within {TOLERANCE:g}"],
        rows,
    )
    return worst <= TOLERANCE


def _records(device: str, folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a run of the demo, made smaller."""
    config = demo_config("lora").model_dump(mode="json")
    for section, values in DEMO.items():
        config[section] = {**(config[section] or {}), **values}
    config |= {"why": "full", "run": {**config["run"], "device": device, "threads": 1}}
    config["report"]["figures"] = "none"
    run_stages(
        catalogue(),
        Config.model_validate(config),
        run_dir=folder,
        show=StageDisplay(quiet=True),
        command="bench",
        last="score",
    )
    rolled = read_record(folder / "rollout", RolloutResult)
    collected = read_record(folder / "collect", CollectResult)
    scored = read_record(folder / "score", ScoreResult)
    assert rolled.control is not None
    return {
        "rollout.safety": rolled.safety,
        "rollout.control": rolled.control,
        "collect.gram": collected.gram,
        "collect.losses": collected.losses,
        "score.c_update": scored.c_update,
        "score.module_second_order": scored.module_second_order,
    }


def _speed(size: str, device: torch.device) -> None:
    """One size: seconds, tokens a second against plain passes, and memory against the prediction."""
    task, config = _task(size, device), _config()
    plain = _plain(task, device)
    tokens = task.finetune.statistics["tokens_mean"]
    timed = calibrate(task, config)
    predicted = _predicted(task, config, timed)
    lines: list[list[str]] = []

    def line(name: str, work: Callable[[Path], float]) -> None:
        """`work` returns what it did, in forward passes of one token."""
        with tempfile.TemporaryDirectory() as folder:
            _reset(device)
            start = time.perf_counter()
            done = work(Path(folder))
            _wait(device)
            seconds = time.perf_counter() - start
        rate, peak, told = done / 3 / seconds, _peak(device), predicted.get(name)
        lines.append(
            [
                name,
                f"{seconds:.1f} s",
                f"{rate:,.0f}",
                f"{rate / plain:.2f}",
                "–" if peak is None else f"{peak:.2f} GB",
                "–" if told is None else f"{told:.2f} GB",
            ]
        )

    training = config.training

    def trained(folder: Path) -> float:
        del folder
        layout = layout_of(task.model, task.parameter_names)
        with measuring(task.model, layout), keeping_parameters(task.model, layout):
            follow(PlannedRun(task, layout, recipe_of(training, STEPS), 0), 1, TIMED, [])
        return 3 * TIMED * BATCH * tokens

    def rolled(folder: Path) -> float:
        made = rollout(task, config=config.rollout, training=training, steps=STEPS, workspace=folder)
        rows = made.gradient_evaluations * BATCH
        passes = {"gradient rows": rows, "forward rows": made.safety_passes * SAFETY}
        return forward_tokens(task, passes)

    def collected(folder: Path) -> float:
        collect(task, config.collect, folder)
        return forward_tokens(task, {"single-row gradients": SAFETY})

    def screened(folder: Path) -> float:
        screen(task, config=config.screen, training=training, steps=STEPS, workspace=folder)
        return forward_tokens(task, {"single-row gradients": SAFETY, "gradient rows": FINETUNE})

    line("training", trained)
    line("rollout", rolled)
    line("collect", collected)
    line("screen", screened)
    print_table(
        f"random Llama {size}, {task.description['dtype']}, LoRA r = 8, {BATCH} rows of {tokens:.0f} tokens; "
        f"plain forward and backward: {plain:,.0f} tokens/s",
        ["stage", "time", "tokens/s", "of plain", "peak on the device", "predicted by check"],
        lines,
    )


def _config() -> Config:
    return Config(
        model={"source": "python", "entry": "tests/bench/gpu.py:main"},  # pyright: ignore[reportArgumentType] - pydantic reads a mapping
        training=TrainingConfig(max_steps=STEPS, batch_size=BATCH, learning_rate=1e-4, loss="rows"),
        rollout=RolloutConfig(segments=3, carry_out=False),
        collect=CollectConfig(store="gram"),
        screen=ScreenConfig(points="start", examples=2, what_if=False),
    )


def _task(size: str, device: torch.device) -> Task:
    """A random Llama with an adapter, and random rows of real length."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, width, inner, layers, heads = SIZES[size]
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        made: Any = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=width,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                use_cache=False,
            )
        ).to(dtype)
    net = attach_adapter(made, AdapterConfig(r=8), seed=0).to(device)
    names = select_parameters(net, "auto")
    return Task(
        model=net,
        safety=_rows("safety", SAFETY, vocabulary),
        finetune=_rows("finetune", FINETUNE, vocabulary),
        parameter_names=names,
        lora_pairs=lora_pairs(net, names),
        description={"dtype": str(dtype).removeprefix("torch.")},
    )


def _rows(name: str, count: int, vocabulary: int) -> SampleSet:
    made = batches(None, count, batch=BATCH, vocabulary=vocabulary)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in made) / count
    rows = [{"prompt": "", "response": "", "line": i} for i in range(count)]
    return SampleSet(name, made, per_sample_nll, rows, {"rows": count, "tokens_mean": tokens})


def _plain(task: Task, device: torch.device) -> float:
    """Tokens a second of plain forward and backward passes of the same model on the same rows."""
    made = [
        {k: v.to(device) if torch.is_tensor(v) else v for k, v in b.items()} for b in task.finetune.batches
    ]
    chosen = set(task.parameter_names)
    flags = {name: p.requires_grad for name, p in task.model.named_parameters()}
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(name in chosen)

    def passed(which: list[Any]) -> None:
        for batch in which:
            task.finetune.loss_fn(task.model, batch).mean().backward()
            task.model.zero_grad(set_to_none=True)
        _wait(device)

    # The first passes of a process load kernels: a whole round goes before, and the faster of two counts.
    passed(made)
    took: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        passed(made)
        took.append(time.perf_counter() - start)
    seconds = min(took)
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(flags[name])
    return FINETUNE * task.finetune.statistics["tokens_mean"] / seconds


def _predicted(task: Task, config: Config, timed: Any) -> dict[str, float]:
    """Peak memory on the device by stage, as check says it; empty on a CPU."""
    found: dict[str, float] = {}
    stages = catalogue()
    with tempfile.TemporaryDirectory() as folder:
        scene = CostScene(task, config, Path(folder), timed.seconds, timed.memory, timed.device)
        for name, stage in (("training", "verify"), *((n, n) for n in ("rollout", "collect", "screen"))):
            told = cost_of(stages.get(stage), scene).device_gb
            if told is not None:
                found[name] = told
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


if __name__ == "__main__":
    main()
