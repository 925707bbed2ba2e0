"""The snippet of the guide runs as it stands."""

import copy
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch

from arisk.config.names import METHODS
from arisk.models.losses import per_sample_nll
from tests.guard.test_pipeline import FAST, task
from tests.models.test_trainer import arguments as trainer_arguments

GUIDE = Path(__file__).parents[2] / ".github" / "GUIDE.md"


def test_the_snippet_runs(tmp_path, monkeypatch):
    text = GUIDE.read_text(encoding="utf-8").partition("## Fine-tune with protection")[2]
    snippet = text.partition("```python\n")[2].partition("```")[0]
    assert '{"mode": "lora"}' in snippet
    told = text.partition("In your own loop")[2].partition("```")[0]
    assert all(f"`{name}`" in told for name in ("model", "batches", "ft_loss_fn", "optimizer"))
    # The same plan at the size of a test.
    snippet = snippet.replace('{"mode": "lora"}', "FAST")
    monkeypatch.chdir(tmp_path)
    job = task(rows=6)
    batches = list(islice(iter(job.finetune.batches), 3))
    known = {
        "FAST": FAST,
        "model": job.model,
        "batches": batches,
        "ft_loss_fn": per_sample_nll,
        "optimizer": torch.optim.SGD([p for p in job.model.parameters() if p.requires_grad], lr=0.1),
        "loaders": {
            "model": job.model,
            "safety_dataloader": list(job.safety.batches),
            "safety_loss_fn": per_sample_nll,
            "fine_tune_dataloader": batches,
            "fine_tune_loss_fn": per_sample_nll,
        },
    }
    exec(compile(snippet, "GUIDE.md", "exec"), known)
    assert (tmp_path / "guard" / "record.json").exists()


def known_to(tmp_path):
    """What the lines for a trainer say is the reader's own."""
    transformers = pytest.importorskip("transformers")
    job = task(rows=8)
    rows = [{"prompt": row["prompt"]} for row in job.safety.rows]
    if find_spec("datasets"):
        rows = import_module("datasets").Dataset.from_list(rows)
    dataset = [
        {key: batch[key][0] for key in ("input_ids", "attention_mask", "labels")}
        for batch in (job.finetune.batches.of([row]) for row in range(4))
    ]
    settings = {"per_device_train_batch_size": 1, "learning_rate": 1e-3}
    settings["lr_scheduler_type"] = transformers.TrainingArguments.lr_scheduler_type
    return {
        "load": lambda: copy.deepcopy(job.model),
        "tokenizer": job.safety.generate.tokenizer,
        "refusals": rows,
        "dataset": dataset,
        "arguments": trainer_arguments(tmp_path, max_steps=2, **settings),
        "few_steps": trainer_arguments(tmp_path, max_steps=1, **settings),
    }


def moved(model, before):
    return any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_snippets_for_a_trainer_run(tmp_path):
    text = GUIDE.read_text(encoding="utf-8").partition("In `Trainer`, with Hugging Face data")[2]
    first, second = (part.partition("```")[0] for part in text.split("```python\n")[1:3])
    assert "safety_rows(model, tokenizer, refusals)" in first
    known = known_to(tmp_path)
    told = text.partition("```python\n")[0] + text.partition("Every other arm")[2].partition("```")[0]
    assert all(f"`{name}`" in told for name in known)
    before = {name: p.detach().clone() for name, p in known["load"]().named_parameters() if p.requires_grad}
    exec(compile(first, "GUIDE.md", "exec"), known)
    assert known["safety"].rows
    assert moved(tuned := known["model"], before)
    exec(compile(second, "GUIDE.md", "exec"), known)
    model = known["model"]
    assert model is not tuned
    described = {name.partition(" ")[0] for name in known["arms"]}
    assert described | {"plain", "smaller"} == set(METHODS)
    for name, arm in known["arms"].items():
        model.load_state_dict(before, strict=False)
        trainer = arm()
        assert not moved(model, before), name
        trainer.train()
        assert trainer.state.global_step == 2
        assert moved(model, before), name
    model.load_state_dict(before, strict=False)
    known["Trainer"](**known["once"], callbacks=[known["watch"]]).train()
    call = next(part for part in text.split("`") if part.startswith("guard.smaller_share("))
    assert f'schedule="{known["arguments"].lr_scheduler_type.value}"' in call
    assert [step for step, _ in known["watch"].history] == [2]
    assert 0 < eval(call.replace("steps=500", "steps=2"), known) < 1
