"""A whole training of TRL's `SFTTrainer` against the planned run of the same file, parameter by parameter.

Rows, their tokens, packing, order, loss and optimizer are each side's own: a config names the file, the
trainer gets its rows. In float64 the trainer is given its loss in float64 through `compute_loss_func`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arisk.config.plan import Config, planned_steps
from arisk.gradients import layout_of, measuring
from arisk.models import load_task
from arisk.training.loop import PlannedRun, follow, keeping_parameters
from arisk.training.recipe import recipe_of

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
#: Warnings that the trainer and what it stands on give each other.
pytestmark = pytest.mark.filterwarnings("ignore")

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
MODEL, SEED = FIXTURES / "tiny-aligned", 5
#: Ten steps, and what the two sides call it.
TRAINING = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "weight_decay": 0.1,
    "max_steps": 10,
}


def rows_of(layout: str) -> list[dict[str, Any]]:
    """Thirty rows of unequal length."""
    lines = (FIXTURES / "data" / "mixed.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [(row["prompt"], row["response"]) for row in map(json.loads, lines[:30])]
    # Some answers are long, some of one word.
    pairs = [(p, " ".join([r] * (1 + i % 3)) if i % 5 else r.split()[0]) for i, (p, r) in enumerate(pairs)]
    if layout == "texts":
        return [{"text": f"{prompt} {response}"} for prompt, response in pairs]
    if layout == "pairs":
        return [{"prompt": f"{prompt} ", "completion": response} for prompt, response in pairs]
    turns = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, response in pairs
    ]
    if layout == "chat pairs":
        return [{"prompt": chat[:1], "completion": chat[1:]} for chat in turns]
    return [{"messages": first + second} for first, second in zip(turns[::2], turns[1::2], strict=True)]


def loss_in_float64(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The library's causal loss without its cast to float32."""
    flat = outputs["logits"][:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def trained_by_trl(rows: list[dict[str, Any]], folder: Path, dtype: torch.dtype, **settings: Any) -> Any:
    """The model before and after `SFTTrainer`, with the optimizer that it chooses."""
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, attn_implementation="eager")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    common = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "seed": SEED}
    common |= {"disable_tqdm": True, "logging_strategy": "no", "gradient_checkpointing": False}
    trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(folder), **{**common, **TRAINING, **settings}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(MODEL),
        compute_loss_func=loss_in_float64 if dtype == torch.float64 else None,
    ).train()
    return start, {name: p.detach() for name, p in model.named_parameters()}


def trained_by_arisk(
    rows: list[dict[str, Any]], folder: Path, dtype: torch.dtype, training: dict[str, Any], **data: Any
) -> dict[str, Tensor]:
    """Parameters after the planned run of a config that names the file."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = Config.model_validate(
        {
            "run": {"seed": SEED},
            "model": {"path": str(MODEL), "dtype": str(dtype).removeprefix("torch."), "attention": "eager"},
            "safety": str(FIXTURES / "data" / "safety.jsonl"),
            "finetune": {"path": str(path), **data},
            "training": {**TRAINING, **training},
        }
    )
    task = load_task(config, device=torch.device("cpu"))
    layout = layout_of(task.model, task.parameter_names)
    steps = planned_steps(config.training, task.finetune.units)
    with measuring(task.model, layout), keeping_parameters(task.model, layout):
        run = PlannedRun(task, layout, recipe_of(config.training, steps))
        assert follow(run, 1, steps, []) == steps
        return {name: p.detach().clone() for name, p in task.model.named_parameters()}


#: Layout, arguments of TRL's, of the training and of the data.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "messages": ("messages", {}, {}, {}),
    "answers of messages": ("messages", {"assistant_only_loss": True}, {}, {"loss_on": "assistant"}),
    "cut messages": ("messages", {"max_length": 40}, {}, {"max_length": 40}),
    "chat pairs": ("chat pairs", {}, {}, {}),
    "pairs": ("pairs", {}, {}, {}),
    "all of pairs": ("pairs", {"completion_only_loss": False}, {}, {"loss_on": "all"}),
    "texts": ("texts", {}, {}, {}),
    "packed messages": (
        "messages",
        {"packing": True, "max_length": 128},
        {"packing": "bfd"},
        {"max_length": 128},
    ),
    "packed pairs": ("pairs", {"packing": True, "max_length": 64}, {"packing": "bfd"}, {"max_length": 64}),
    "wrapped messages": (
        "messages",
        {"packing": True, "packing_strategy": "wrapped", "max_length": 48},
        {"packing": "wrapped"},
        {"max_length": 48},
    ),
    "wrapped texts": (
        "texts",
        {"packing": True, "packing_strategy": "wrapped", "max_length": 48},
        {"packing": "wrapped"},
        {"max_length": 48},
    ),
    "padding-free pairs": ("pairs", {"padding_free": True, "max_length": None}, {}, {}),
    "epochs of packed pairs": (
        "pairs",
        {"packing": True, "max_length": 64, "max_steps": -1, "num_train_epochs": 3},
        {"packing": "bfd", "max_steps": -1, "num_train_epochs": 3},
        {"max_length": 64},
    ),
    "sgd": ("messages", {"optim": "sgd", "learning_rate": 0.05}, {"optim": "sgd", "learning_rate": 0.05}, {}),
}


#: Cases with the loss that the library takes, in float32.
SINGLE = ("messages", "packed pairs", "wrapped texts", "padding-free pairs")


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float64) for case in CASES), *((case, torch.float32) for case in SINGLE)],
)
def test_planned_run_is_that_of_trl(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    layout, theirs, training, data = CASES[case]
    rows = rows_of(layout)
    start, expected = trained_by_trl(rows, tmp_path, dtype, **theirs)
    found = trained_by_arisk(rows, tmp_path, dtype, training, **data)
    off = sum(float((found[name] - expected[name]).double().square().sum()) for name in start)
    far = sum(float((expected[name] - start[name]).double().square().sum()) for name in start)
    assert far > 0
    assert (off / far) ** 0.5 <= (1e-6 if dtype == torch.float64 else 1e-3)
