"""The snippet of the guide runs as it stands."""

from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest
import torch

from arisk.models.losses import per_sample_nll
from tests.guard.test_pipeline import FAST, task
from tests.models.test_trainer import arguments as trainer_arguments

GUIDE = Path(__file__).parents[2] / ".github" / "GUIDE.md"


def test_the_snippet_runs(tmp_path, monkeypatch):
    text = GUIDE.read_text(encoding="utf-8").partition("## Fine-tune with protection")[2]
    snippet = text.partition("```python\n")[2].partition("```")[0]
    assert '{"mode": "lora"}' in snippet
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


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_the_snippet_for_a_trainer_runs(tmp_path):
    transformers = pytest.importorskip("transformers")
    text = GUIDE.read_text(encoding="utf-8").partition("In `Trainer`, with Hugging Face data:")[2]
    snippet = text.partition("```python\n")[2].partition("```")[0]
    assert "safety_rows(model, tokenizer, refusals)" in snippet
    job = task(rows=8)
    rows = [{"prompt": row["prompt"]} for row in job.safety.rows]
    if find_spec("datasets"):
        rows = import_module("datasets").Dataset.from_list(rows)
    dataset = [
        {key: batch[key][0] for key in ("input_ids", "attention_mask", "labels")}
        for batch in (job.finetune.batches.of([row]) for row in range(4))
    ]
    before = {name: p.detach().clone() for name, p in job.model.named_parameters() if p.requires_grad}
    known = {
        "Trainer": transformers.Trainer,
        "model": job.model,
        "tokenizer": job.safety.generate.tokenizer,
        "refusals": rows,
        "dataset": dataset,
        "arguments": trainer_arguments(tmp_path, max_steps=2, per_device_train_batch_size=1),
    }
    exec(compile(snippet, "GUIDE.md", "exec"), known)
    assert known["safety"].rows
    assert any(not torch.equal(p, before[n]) for n, p in job.model.named_parameters() if n in before)
