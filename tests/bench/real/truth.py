"""One real fine-tune by `transformers.Trainer`, measured on the way.

The training is the Trainer's own, so its conventions hold by construction: the loss of a step is the
mean over the trained tokens of all its micro-batches, biases and norms do not decay, the gradient is
clipped at 1, warm-up counts as the Trainer counts, float32 weights run under bfloat16 autocast. A
callback measures between steps and puts back mode and random state.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from tests.bench.real.jobs import SOURCES, Job
from tests.bench.real.measure import (
    ANSWER_TOKENS,
    OPENINGS,
    Scored,
    answer_tokens,
    freeze_in_bfloat16,
    score,
    texts,
)
from tests.bench.real.outcomes import OUTCOMES, outcome
from tests.bench.real.rows import Encoded, collate, encode, pad_id, read_rows, truth_split

#: Steps between early ones, at which ordinary prompts are left out.
SAFETY_ONLY = (5, 15)
#: Answers are read where the openings have turned on this many more of the harmful prompts.
TURNED = 6
LORA_RANK, LORA_ALPHA = 8, 16


def measured_steps(steps: int) -> list[int]:
    """Steps at which the model is measured: early ones, then about six more to the end.

    >>> measured_steps(60)
    [0, 5, 10, 15, 20, 30, 45, 60]
    >>> measured_steps(300)
    [0, 5, 10, 15, 20, 30, 75, 120, 165, 210, 255, 300]
    """
    gap = max(15, math.ceil((steps - 30) / 6))
    return sorted(
        {s for s in (0, 5, 10, 15, 20, 30) if s <= steps} | set(range(30 + gap, steps, gap)) | {steps}
    )


def answered_steps(steps: int) -> set[int]:
    """Steps at which answers are always read: the start, 20, the middle and the end."""
    points = measured_steps(steps)
    return {0, 20, min(points, key=lambda s: (abs(s - steps / 2), s)), steps} & set(points)


class Panel:
    """What a model is measured on: rows and prompts of the truth, and what the aligned model says first.

    Args:
        tokenizer: of the aligned model.
        data: folder of JSONL files.
    """

    def __init__(self, tokenizer: Any, data: Path) -> None:
        self.tokenizer, self.pad = tokenizer, pad_id(tokenizer)
        split = truth_split(data)
        files = {
            name: read_rows(data, name) for name in {name for pairs in split.values() for name, _ in pairs}
        }
        rows = {kind: [files[name][i] for name, i in pairs] for kind, pairs in split.items()}
        self.prompts = {kind: [row["prompt"] for row in rows[kind]] for kind in ("harmful", "harmless")}
        self.rows = {
            kind: [encode(tokenizer, row["prompt"], row["response"]) for row in rows[kind]]
            for kind in ("safety", "control")
        }
        self.openings: dict[str, list[Encoded]] = {}

    def keep_openings(self, said: dict[str, list[list[int]]]) -> None:
        """Remember the first tokens of the aligned model's answers, prompt by prompt."""
        longest = max(OPENINGS)
        for kind, tokens in said.items():
            asked = [encode(self.tokenizer, prompt).tokens for prompt in self.prompts[kind]]
            ends = self.tokenizer.eos_token_id
            self.openings[kind] = [
                # An answer that ends sooner ends with the end token: that too is part of how it opens.
                Encoded((*prompt, *[*answer, ends][:longest]), len(prompt))
                for prompt, answer in zip(asked, tokens, strict=True)
            ]

    def losses(self, model: Any, *, ordinary: bool = True) -> dict[str, Any]:
        """Losses, and how the aligned model's own openings fare now.

        Args:
            model: what to measure.
            ordinary: also the control loss and the openings of harmless prompts.
        """
        safety = score(model, self.rows["safety"], self.pad)
        point: dict[str, Any] = {
            "safety_nll": _mean([row.loss() for row in safety]),
            "opening_nll": {str(k): _mean([row.loss(k) for row in safety]) for k in OPENINGS},
            "own_harmful": _own(score(model, self.openings["harmful"], self.pad)),
        }
        if ordinary:
            point["control_nll"] = _mean([row.loss() for row in score(model, self.rows["control"], self.pad)])
            point["own_harmless"] = _own(score(model, self.openings["harmless"], self.pad))
        return point

    def answers(self, model: Any, kind: str) -> list[list[int]]:
        """Greedy answers of a kind of prompts, as tokens."""
        return answer_tokens(model, self.tokenizer, self.prompts[kind], ANSWER_TOKENS)

    def read(self, tokens: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Texts, outcomes (one letter a prompt) and their counts."""
        said = texts(self.tokenizer, tokens)
        labels = [outcome(text) for text in said]
        counts = {name: labels.count(name) for name in OUTCOMES}
        return {"counts": counts, "labels": "".join(label[0] for label in labels), "texts": said}


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 5)


def _own(rows: Sequence[Scored]) -> dict[str, Any]:
    """Mean log-probability (nats, summed over the opening), and whose opening is still the likeliest."""
    return {
        str(k): {
            "log_prob": _mean([sum(row.log_probs[:k]) for row in rows]),
            "kept": sum(row.opens(k) for row in rows),
            "prompts_kept": "".join(str(int(row.opens(k))) for row in rows),
            "prompts_log_prob": [round(sum(row.log_probs[:k]), 3) for row in rows],
        }
        for k in OPENINGS
    }


def start(folder: Path, panel: Panel, path: Path, device: str = "cpu") -> dict[str, Any]:
    """Measures of the aligned model, once for all its jobs: an adapter changes nothing at step 0."""
    if not path.exists():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        freeze_in_bfloat16(model.to(device))
        said = {kind: panel.answers(model, kind) for kind in panel.prompts}
        panel.keep_openings(said)
        point = {"step": 0, **panel.losses(model)}
        point |= {f"answers_{kind}": panel.read(tokens) for kind, tokens in said.items()}
        write_json(path, {"point": point, "said": said})
    found = json.loads(path.read_text(encoding="utf-8"))
    panel.keep_openings(found["said"])
    return found["point"]


def run(
    job: Job,
    model_folder: Path,
    data: Path,
    cache: Path,
    stop: Callable[[], bool] = lambda: False,
    device: str = "cpu",
) -> dict[str, Any] | None:
    """Train and measure; writes `cache/<job>.json` and returns it.

    A job that is there is not run again, one that was left unfinished goes on from the last step that
    was measured. None where another process runs it now, or where it was told to stop.

    Args:
        job: what to carry out.
        model_folder: the aligned model.
        data: folder of JSONL files.
        cache: where jobs are kept.
        stop: asked after each measured step.
        device: `cpu`, or `cuda` for the first GPU.
    """
    path = cache / f"{job.name()}.json"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            if not path.exists() and (result := _carried_out(job, model_folder, data, cache, stop, device)):
                write_json(path, result)
                shutil.rmtree(path.with_suffix(".run"), ignore_errors=True)
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except Timeout:
        return None


def _carried_out(
    job: Job, model_folder: Path, data: Path, cache: Path, stop: Callable[[], bool], device: str
) -> dict[str, Any] | None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(job.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    panel = Panel(tokenizer, data)
    first = start(model_folder, panel, cache / "start.json", device)
    rows = [encode(tokenizer, row["prompt"], row["response"]) for row in SOURCES[job.source](data)]
    progress = Progress([first])
    output = cache / f"{job.name()}.run"
    train = _train(job, model.to(device), model_folder, rows, panel, progress, output, stop)
    if progress.points[-1]["step"] < job.steps:
        return None
    seconds = {"training": round(progress.training, 1), "measuring": round(progress.measuring, 1)}
    return {
        "job": job.as_dict(),
        "rows": len(rows),
        "cpu_seconds": seconds,
        "train": train | {"adam_move": progress.adam_move},
        "points": progress.points,
    }


@dataclass
class Progress:
    """What a job has found so far; kept beside the Trainer's checkpoint.

    Attributes:
        points: measures, the start first.
        adam_move: see `_adam_move`, at the first measured step.
        training, measuring: CPU seconds.
    """

    points: list[dict[str, Any]]
    adam_move: float = math.nan
    training: float = 0.0
    measuring: float = 0.0

    def restore(self, folder: Path, step: int) -> None:
        """Take over what was found up to the step of a checkpoint."""
        known = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        self.points = [point for point in known.pop("points") if point["step"] <= step]
        vars(self).update(known)


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_ALPHA,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapter)


def _twin(model: Any, folder: Path) -> Callable[[], Any]:
    """A second model that takes over the first one's weights, matrices as autocast casts them."""
    from transformers import AutoModelForCausalLM

    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    freeze_in_bfloat16(twin.to(model.device))
    weights = dict(model.named_parameters(remove_duplicate=False))

    def taken_over() -> Any:
        with torch.no_grad():
            for name, weight in twin.named_parameters(remove_duplicate=False):
                weight.copy_(weights[name])
        return twin

    return taken_over


def _train(
    job: Job,
    model: Any,
    folder: Path,
    rows: list[Encoded],
    panel: Panel,
    progress: Progress,
    output: Path,
    stop: Callable[[], bool],
) -> dict[str, list[float]]:
    """Carry out the plan, from its last checkpoint in `output` on, and note what is found in `progress`.

    Returns:
        Loss and gradient norm of each step so far.
    """
    from transformers.trainer_utils import get_last_checkpoint

    if job.mode == "lora":
        model = with_adapter(model)
        freeze_in_bfloat16(model.get_base_model())
        shown = model.get_base_model
    else:
        shown = _twin(model, folder)
    output.mkdir(exist_ok=True)
    checkpoint = get_last_checkpoint(str(output))
    if checkpoint is not None:
        progress.restore(output, int(checkpoint.rpartition("-")[2]))
    callback = _measuring(job, shown, panel, progress, output, stop)
    trainer = planned_trainer(job, model, rows, panel.pad, output, callbacks=[callback])
    trainer.train(resume_from_checkpoint=checkpoint)
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    return {
        "loss": [round(entry["loss"], 4) for entry in log],
        "grad_norm": [round(float(entry["grad_norm"]), 4) for entry in log],
    }


def planned_trainer(
    job: Job,
    model: Any,
    rows: Sequence[Encoded],
    pad: int,
    output: Path,
    *,
    callbacks: Sequence[Any] = (),
    whole_labels: bool = False,
    steps: Sequence[Sequence[Encoded]] = (),
) -> Any:
    """The `transformers.Trainer` that carries out a job.

    Args:
        job: the plan.
        model: what it trains, adapter included.
        rows: the fine-tuning rows.
        pad: token that fills.
        output: folder of its checkpoints.
        callbacks: what watches it.
        whole_labels: labels for every token, as people collate them; the loss is the same.
        steps: rows of every step in turn, instead of `rows` in a drawn order.
    """
    from transformers import Trainer, TrainingArguments

    settings = _arguments(job, model.device.type)
    if steps:
        settings |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 1}

    def collated(batch: Sequence[Any]) -> dict[str, Any]:
        return collate(batch[0] if steps else batch, pad, whole=whole_labels)

    return Trainer(
        model=model,
        args=TrainingArguments(**settings, output_dir=str(output)),
        train_dataset=steps or rows,  # type: ignore[arg-type]
        data_collator=collated,
        callbacks=list(callbacks),
    )


def _measuring(
    job: Job,
    shown: Callable[[], Any],
    panel: Panel,
    progress: Progress,
    output: Path,
    stop: Callable[[], bool],
) -> Any:
    """A callback that measures at the planned steps, keeps a checkpoint there and stops where told."""
    from transformers import TrainerCallback

    planned, clock = measured_steps(job.steps), [time.process_time()]

    def spent() -> float:
        before, clock[0] = clock[0], time.process_time()
        return clock[0] - before

    class Measure(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            spent()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step not in planned:
                return
            progress.training += spent()
            progress.points.append(_point(state.global_step, shown(), panel, progress.points, job.steps))
            if len(progress.points) == 2:
                progress.adam_move = _adam_move(kwargs["optimizer"])
            progress.measuring += spent()
            control.should_training_stop = control.should_training_stop or stop()
            # Checkpoints of all weights are large: only where the work would else be lost.
            control.should_save = job.mode == "lora" or control.should_training_stop
            write_json(output / "progress.json", asdict(progress))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            spent()

    return Measure()


def _arguments(job: Job, device: str) -> dict[str, Any]:
    """The job as `TrainingArguments`; what stands in neither is the Trainer's default."""
    return {
        "use_cpu": device == "cpu",
        "bf16": True,
        "optim": "adamw_torch",
        "max_grad_norm": 1.0,
        "learning_rate": job.learning_rate,
        "max_steps": job.steps,
        "lr_scheduler_type": job.schedule,
        # Below 1 it is a share of the steps.
        "warmup_steps": job.warmup_ratio,
        "weight_decay": job.weight_decay,
        "per_device_train_batch_size": job.batch,
        "gradient_accumulation_steps": job.accumulation,
        "seed": job.seed,
        "data_seed": job.seed,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "save_total_limit": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _adam_move(optimizer: Any) -> float:
    """‖m̂/(√v̂ + ε)‖ over all parameters: how far a unit of learning rate goes now."""
    inner = getattr(optimizer, "optimizer", optimizer)
    total = 0.0
    for group in inner.param_groups:
        b1, b2 = group["betas"]
        for p in group["params"]:
            state = inner.state.get(p)
            if state:
                n = float(state["step"])
                unit = (
                    state["exp_avg"]
                    / (1 - b1**n)
                    / ((state["exp_avg_sq"] / (1 - b2**n)).sqrt() + group["eps"])
                )
                total += float(unit.square().sum())
    return round(math.sqrt(total), 4)


def _point(step: int, model: Any, panel: Panel, points: list[dict[str, Any]], end: int) -> dict[str, Any]:
    """Measures at one step; answers where they are due or the openings have turned since the last ones."""
    point: dict[str, Any] = {"step": step, **panel.losses(model, ordinary=step not in SAFETY_ONLY)}
    last = next(p for p in reversed(points) if "answers_harmful" in p)
    kept, kept_then = (p["own_harmful"]["5"]["kept"] for p in (point, last))
    if step in answered_steps(end) or abs(kept - kept_then) >= TURNED:
        point["answers_harmful"] = panel.read(panel.answers(model, "harmful"))
    if step == end:
        point["answers_harmless"] = panel.read(panel.answers(model, "harmless"))
    return point


def write_json(path: Path, value: Any) -> None:
    """Write as a whole or not at all, so that an interrupted job leaves nothing half done."""
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
