"""The planned run against `transformers.Trainer` with the same arguments, parameter by parameter.

The trainer gets the same rows and its own sampler: the order is part of what must agree. In float64 it is
given its loss in float64 through its own `compute_loss_func`, for the library's casts logits to float32.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arisk.base.task import SampleSet, Task
from arisk.config.plan import AdapterConfig, TrainingConfig, planned_steps
from arisk.gradients import layout_of, measuring
from arisk.models.batching import PlannedBatches
from arisk.models.formats import Row
from arisk.models.losses import TOKENS, per_sample_nll
from arisk.models.rendering import Rendered
from arisk.models.selection import attach_adapter
from arisk.training.loop import PlannedRun, follow, keeping_parameters
from arisk.training.recipe import recipe_of

transformers = pytest.importorskip("transformers")
peft_optimizers = pytest.importorskip("peft.optimizers")

VOCABULARY, SEED = 61, 5
STEPS = 10


def llama(*, tied: bool = False) -> Any:
    """Two layers, sixteen wide; norms without bias."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    """Layer norms and biases, tied embeddings; dropout would draw from another stream."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        attn_implementation="eager",
    )
    return transformers.GPT2LMHeadModel(config)


def lora(model: Any) -> Any:
    """Rank two everywhere, B drawn as well so that both sides have gradients from the start."""
    adapted = attach_adapter(model, AdapterConfig(r=2, alpha=4), seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return adapted


def rows(count: int) -> list[Rendered]:
    """Rows of unequal length, the last 2 to 11 tokens of each trained."""
    generator = torch.Generator().manual_seed(1)
    found: list[Rendered] = []
    for _ in range(count):
        prompt, response = torch.randint(2, 12, (2,), generator=generator).tolist()
        tokens = torch.randint(1, VOCABULARY, (prompt + response,), generator=generator).tolist()
        found.append(Rendered(tuple(tokens), ((prompt, len(tokens)),), prompt, Row(), "last"))
    return found


def collated(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded on the right."""
    longest = max(len(row["input_ids"]) for row in batch)
    made: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in batch:
        pad = longest - len(row["input_ids"])
        made["input_ids"].append([*row["input_ids"], *[0] * pad])
        made["labels"].append([*row["labels"], *[-100] * pad])
        made["attention_mask"].append([*[1] * len(row["input_ids"]), *[0] * pad])
    return {name: torch.tensor(values) for name, values in made.items()}


def loss_in_float64(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The library's causal loss without its cast to float32."""
    flat = outputs["logits"][:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def trained_by_trainer(
    model: Any, data: list[Rendered], folder: Path, optimizer: Any = None, **arguments: Any
) -> dict[str, Tensor]:
    """Parameters after `transformers.Trainer`, with an optimizer made for the model where one is given."""
    double = next(model.parameters()).dtype == torch.float64
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=SEED,
        remove_unused_columns=False,
        **arguments,
    )
    dataset = [
        {
            "input_ids": list(row.tokens),
            "labels": row.labels(),
        }
        for row in data
    ]
    transformers.Trainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collated,
        compute_loss_func=loss_in_float64 if double else None,
        optimizers=(None if optimizer is None else optimizer(model), None),
    ).train()
    return parameters_of(model)


def parameters_of(model: Any) -> dict[str, Tensor]:
    """What trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained_by_arisk(model: Any, data: list[Rendered], **settings: Any) -> dict[str, Tensor]:
    """Parameters after the planned run."""
    training = TrainingConfig(**settings)
    batches = PlannedBatches(data, training.batch_size, 0, SEED)
    samples = SampleSet("finetune", batches, per_sample_nll, tokens=TOKENS)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    task = Task(model=model, safety=samples, finetune=samples, parameter_names=names)
    layout = layout_of(model, names)
    steps = planned_steps(training, len(data))
    with measuring(model, layout), keeping_parameters(model, layout):
        run = PlannedRun(task, layout, recipe_of(training, steps))
        assert follow(run, 1, steps, []) == steps
        return {name: p.detach().clone() for name, p in model.named_parameters() if name in names}


def difference(model: Any, data: list[Rendered], folder: Path, ours: dict[str, Any], **theirs: Any) -> float:
    """‖θ − θ_HF‖ / ‖θ_HF − θ*‖ over what trains."""
    start = parameters_of(model)
    found = trained_by_arisk(copy.deepcopy(model), data, **ours)
    expected = trained_by_trainer(model, data, folder, **theirs)
    off = sum(float((found[name] - expected[name]).double().square().sum()) for name in start)
    far = sum(float((expected[name] - start[name]).double().square().sum()) for name in start)
    assert far > 0
    return (off / far) ** 0.5


BASE = {"learning_rate": 1e-3, "max_steps": STEPS, "batch_size": 4, "eps": 1e-8}
#: What our settings are called there, and what holds in every case.
NAMES = {
    "batch_size": "per_device_train_batch_size",
    "gradient_accumulation": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "optimizer": "optim",
    "schedule": "lr_scheduler_type",
    "schedule_args": "lr_scheduler_kwargs",
    "eps": "adam_epsilon",
}


def cases() -> list[Any]:
    """Settings of ours, and further arguments of theirs."""
    typical = {"gradient_accumulation": 4, "schedule": "cosine", "warmup_steps": 4, "weight_decay": 0.1}
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "one row": ({"batch_size": 1}, {}),
        "batch": ({}, {}),
        "accumulation": ({"batch_size": 1, "gradient_accumulation": 4}, {}),
        "typical": (typical, {}),
        "sgd": ({"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.1}, {}),
        "sgd with momentum": (
            {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9},
            {"optim_args": "momentum=0.9"},
        ),
        "adafactor": ({"optimizer": "adafactor", "weight_decay": 0.1}, {}),
        "rmsprop": ({"optimizer": "rmsprop"}, {}),
        "tight clipping": ({"max_grad_norm": 0.05, "optimizer": "sgd", "learning_rate": 0.5}, {}),
        "no clipping": ({"max_grad_norm": 0.0, "optimizer": "sgd", "learning_rate": 0.1}, {}),
        "short last step": ({"epochs": 3, "max_steps": None, "gradient_accumulation": 2}, {}),
        "steps over epochs": ({"batch_size": 8, "gradient_accumulation": 2}, {}),
        "warm-up ratio": (
            {"schedule": "linear", "warmup_ratio": 0.25},
            {"warmup_steps": 0.25},
        ),
    }
    schedules: dict[str, dict[str, Any]] = {
        "constant_with_warmup": {},
        "linear": {},
        "cosine_with_restarts": {"num_cycles": 2},
        "cosine_with_min_lr": {"min_lr_rate": 0.2},
        "polynomial": {"power": 2.0, "lr_end": 1e-5},
        "inverse_sqrt": {},
        "warmup_stable_decay": {"num_decay_steps": 3},
    }
    for name, arguments in schedules.items():
        found[name] = ({"schedule": name, "warmup_steps": 3, "schedule_args": arguments}, {})
    return [pytest.param(*settings, id=name) for name, settings in found.items()]


@pytest.mark.parametrize(("ours", "theirs"), cases())
def test_planned_run_is_the_trainers_in_float64(
    ours: dict[str, Any], theirs: dict[str, Any], tmp_path: Path
) -> None:
    ours = {**BASE, **ours}
    ours = {name: value for name, value in ours.items() if value is not None}
    named = {NAMES.get(name, name): value for name, value in ours.items()}
    for name in ("momentum", "warmup_ratio"):
        named.pop(name, None)
    named = {"optim": "adamw_torch", "lr_scheduler_type": "constant", **named, **theirs}
    if ours.get("optimizer") not in {None, "adamw"}:
        ours.pop("eps")
    assert difference(llama().double(), rows(22), tmp_path, ours, **named) <= 1e-6


TYPICAL = {
    **BASE,
    "batch_size": 2,
    "gradient_accumulation": 2,
    "schedule": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
}
#: How each model is made, and the precision of its weights or of its passes.
MODELS = {
    "llama": (llama, {}),
    "tied": (lambda: llama(tied=True), {}),
    "gpt2": (gpt2, {}),
    "lora": (lambda: lora(llama()), {}),
    "autocast": (llama, {"precision": "bf16"}),
    "gpt2 autocast": (gpt2, {"precision": "bf16"}),
    "fp16 on a cpu": (llama, {"precision": "fp16"}),
    "bfloat16": (lambda: llama().to(torch.bfloat16), {}),
}


@pytest.mark.parametrize("case", MODELS)
def test_planned_run_is_the_trainers_in_float32(case: str, tmp_path: Path) -> None:
    """The library's own loss; weights in bfloat16 step by its grid, so they must agree as well."""
    make, precision = MODELS[case]
    named = {NAMES.get(name, name): value for name, value in TYPICAL.items()}
    flag = precision.get("precision")
    named |= {"optim": "adamw_torch", **({flag: True} if flag else {})}
    assert difference(make(), rows(22), tmp_path, {**TYPICAL, **precision}, **named) <= 1e-3


@pytest.mark.parametrize("case", ["tied", "gpt2", "lora"])
def test_kinds_of_models_in_float64(case: str, tmp_path: Path) -> None:
    """Tied weights, biases and layer norms without decay, adapters."""
    named = {NAMES.get(name, name): value for name, value in TYPICAL.items()}
    named |= {"optim": "adamw_torch"}
    assert difference(MODELS[case][0]().double(), rows(22), tmp_path, TYPICAL, **named) <= 1e-6


class Signs(torch.optim.Optimizer):
    """Lion as its authors' pseudocode writes it: decay, step along the sign, then the momentum."""

    def step(self, closure: Any = None) -> None:
        assert closure is None
        for group in self.param_groups:
            rate, decay, (first, second) = group["lr"], group["weight_decay"], group["betas"]
            for p in group["params"]:
                held = self.state[p].get("m", torch.zeros_like(p))
                update = torch.sign(first * held + (1 - first) * p.grad) + decay * p.data
                p.data = p.data - rate * update
                self.state[p]["m"] = second * held + (1 - second) * p.grad


def lion(model: Any) -> Any:
    """Only matrices decay, as the trainer groups them."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for name, p in named if ("norm" in name) is plain],
            "weight_decay": 0.0 if plain else 0.1,
        }
        for plain in (False, True)
    ]
    return Signs(groups, {"lr": TYPICAL["learning_rate"], "betas": (0.9, 0.99)})


def loraplus(model: Any) -> Any:
    """peft's own optimizer."""
    return peft_optimizers.create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=TYPICAL["learning_rate"],
        loraplus_lr_ratio=16.0,
        loraplus_weight_decay=0.1,
        eps=1e-8,
    )


#: An optimizer that is handed to the trainer, how the model is made, and what the plan says of it.
OPTIMIZERS = {
    "lion": (lion, llama, {"optimizer": "lion", "betas": (0.9, 0.99)}),
    "lora+": (loraplus, lambda: lora(llama()), {"loraplus_lr_ratio": 16.0, "eps": 1e-8}),
}


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
@pytest.mark.parametrize("case", OPTIMIZERS)
def test_optimizers_that_no_argument_of_the_trainer_names(
    case: str, dtype: torch.dtype, limit: float, tmp_path: Path
) -> None:
    optimizer, make, settings = OPTIMIZERS[case]
    model = make().to(dtype)
    ours = {name: value for name, value in TYPICAL.items() if name != "eps"} | settings
    named = {NAMES.get(name, name): value for name, value in TYPICAL.items()}
    assert difference(model, rows(22), tmp_path, ours, optimizer=optimizer, **named) <= limit


def test_means_of_rows_are_another_run(tmp_path: Path) -> None:
    """The matrix can fail: rows' means instead of tokens' are far away."""
    named = {NAMES.get(name, name): value for name, value in BASE.items()}
    named |= {"optim": "adamw_torch", "lr_scheduler_type": "constant"}
    assert difference(llama().double(), rows(22), tmp_path, {**BASE, "loss": "rows"}, **named) > 0.05
