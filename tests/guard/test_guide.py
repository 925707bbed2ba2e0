"""The snippet of the guide runs as it stands."""

from itertools import islice
from pathlib import Path

import torch

from arisk.models.losses import per_sample_nll
from tests.guard.test_pipeline import FAST, task

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
