"""What `arisk check --json` says of the planned training, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arisk.base.errors import ConfigError
from arisk.config.yaml import load_config
from arisk.cost.check import check_task, check_text

transformers = pytest.importorskip("transformers")
DEMO = Path(__file__).parent.parent.parent / "configs" / "demo.yaml"
SMALL = [
    *(
        "safety.max_samples=4",
        "finetune.max_samples=9",
        "control.max_samples=4",
        "verify.safety.max_samples=4",
    ),
    *("training.max_steps=null", "training.epochs=2", "training.batch_size=2", "training.weight_decay=0.1"),
    *("training.schedule=cosine", "training.warmup_steps=3", "training.gradient_accumulation=2"),
]


@pytest.mark.parametrize("adapter", [[], ["model.adapter=null"]], ids=["lora", "full"])
def test_steps_rates_and_decay_are_the_trainers(adapter: list[str], tmp_path: Path) -> None:
    config = load_config(DEMO, [*SMALL, *adapter])
    kept: dict[str, Any] = {}
    found = check_task(config, kept=kept)
    (model,) = kept.values()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        learning_rate=config.training.learning_rate,
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=3,
    )
    trainer = transformers.Trainer(model=model, args=args)
    # Nine rows are five batches of two, and these three steps of two batches.
    assert found["training_steps"] == 6
    trainer.create_optimizer_and_scheduler(num_training_steps=6)
    rates = []
    for _ in range(6):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert found["learning_rates"] == pytest.approx(rates)

    names = {id(p): name for name, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert found["weight_decay"] == decay
    assert found["trained_parameters"] == [name for name, p in model.named_parameters() if p.requires_grad]
    assert (set(decay.values()) == {0.1}) == (not adapter)


def test_a_bad_recipe_is_told_before_a_model_is_read(tmp_path: Path) -> None:
    wrong = ["training.optimizer=sgd", "training.optimizer_args={nesterov: true}", f"model.path={tmp_path}"]
    with pytest.raises(ConfigError, match="Nesterov") as caught:
        check_task(load_config(DEMO, wrong))
    assert caught.value.where == "training.optimizer_args"


def test_what_is_carried_out_as_something_else_is_said() -> None:
    found = check_task(load_config(DEMO, [*SMALL, "training.optimizer=paged_adamw_8bit"]))
    (said,) = [warning for warning in found["warnings"] if "full precision" in warning]
    assert f"warning: {said}" in " ".join(check_text(found).split())
    assert not any(
        "full precision" in warning for warning in check_task(load_config(DEMO, SMALL))["warnings"]
    )
