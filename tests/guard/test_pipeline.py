"""The regulariser on a peft adapter of the embedded model, through the pipeline."""

import warnings
from itertools import islice
from pathlib import Path

import pytest
import torch

import arisk
from arisk import AlignGuardConfig, AlignmentRiskPipeline
from arisk.base.errors import ConfigError
from arisk.base.task import SampleSet
from arisk.config.plan import AdapterConfig, Config
from arisk.guard import adapter_sites
from arisk.models import load_task
from arisk.models.losses import per_sample_nll
from arisk.models.selection import attach_adapter

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
FAST = {
    "mode": "lora",
    "training": {"optimizer": "sgd", "learning_rate": 0.1, "max_steps": 2},
    "score": {"batches": 2, "hvp_batches": 1, "nulls": 0, "examples": 0, "probe_points": 2, "krylov_dim": 2},
    "rollout": {"enabled": False},
    "forecast": {"bootstrap_samples": 20},
}


def task(rows=12, **model):
    data = {
        name: {"path": str(FIXTURES / "data" / f"{file}.jsonl"), "max_samples": rows, "chat_template": "auto"}
        for name, file in (("safety", "safety"), ("finetune", "risky"))
    }
    found = {"path": str(FIXTURES / "tiny-aligned"), "adapter": {"r": 4, "alpha": 8}, **model}
    config = {"model": found, "training": {"batch_size": 4}, **data}
    return load_task(Config.model_validate(config), device=torch.device("cpu"))


def train(job, steps, guard=None):
    """Plain SGD on the planned batches; returns the rise of the mean safety loss."""
    model = job.model
    batches = list(islice(iter(job.finetune.batches), steps))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.3)

    def safety():
        with torch.no_grad():
            return float(torch.cat([per_sample_nll(model, b) for b in job.safety.batches]).mean())

    before = safety()
    for batch in batches:
        optimizer.zero_grad()
        loss = per_sample_nll(model, batch).mean()
        (loss if guard is None else guard.regularized_loss(loss).total_loss).backward()
        optimizer.step()
    return safety() - before


def test_a_report_gives_a_mitigator_that_keeps_safety():
    job = task()
    pipeline = AlignmentRiskPipeline(FAST)
    report = pipeline.run(
        model=job.model,
        safety_dataloader=list(job.safety.batches),
        safety_loss_fn=per_sample_nll,
        fine_tune_dataloader=list(islice(iter(job.finetune.batches), 3)),
        fine_tune_loss_fn=per_sample_nll,
    )
    config = AlignGuardConfig(lambda_a=3.0, lambda_t=0.01, lambda_nc=0.1, alpha=0.5)
    guard = pipeline.build_lora_mitigator(job.model, report.subspace, config=config)
    assert guard.status == "ready"
    assert len(guard.sites) == 28
    assert len(guard.directions.eigenvalues) == min(report.subspace.rank, 12)
    assert 0.5 < guard.directions.captured <= 1

    plain = train(task(), 20)
    guarded = train(job, 20, guard)
    assert plain > 0
    assert guarded < plain


def test_missing_pairs_are_an_error_or_a_skip():
    job = task(adapter=None)
    pipeline = AlignmentRiskPipeline({"mode": "lora"})
    with pytest.raises(ConfigError, match="no safety samples"):
        pipeline.build_lora_mitigator(job.model)
    with pytest.raises(ConfigError, match="no trainable LoRA pair"):
        pipeline.build_lora_mitigator(job.model, safety=job.safety)
    guard = pipeline.build_lora_mitigator(job.model, safety=job.safety, require_lora_match=False)
    assert guard.status == "skipped"


def test_a_parameter_without_partner_is_named():
    job = task()
    frozen = next(p for name, p in job.model.named_parameters() if "lora_B" in name)
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match="belongs to no"):
        AlignmentRiskPipeline({"mode": "lora"}).build_lora_mitigator(job.model, safety=job.safety)


def test_full_mode_guards_the_weights_themselves():
    job = task(rows=4, adapter=None)
    guard = AlignmentRiskPipeline({"mode": "full"}).build_lora_mitigator(
        job.model, safety=job.safety, config=AlignGuardConfig(width=4, rank=2)
    )
    assert len(guard.sites) == len(list(job.model.parameters()))
    with torch.no_grad():
        next(job.model.parameters()).add_(0.01)
    assert float(guard.penalty().total.detach()) > 0


def test_a_transposed_layer_is_guarded_as_its_matrix():
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).eval()
    warnings.filterwarnings("ignore", "fan_in_fan_out")
    model = attach_adapter(gpt2, AdapterConfig(r=2, target_modules=["c_attn"]), seed=0).eval()
    sites, unmatched = adapter_sites(model)
    assert [site.transposed for site in sites] == [True]
    assert not unmatched
    ids = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    guard = AlignmentRiskPipeline({"mode": "lora"}).build_lora_mitigator(
        model, safety=SampleSet("safety", [batch], per_sample_nll), config=AlignGuardConfig(width=64, rank=1)
    )
    # First order: moving ΔW along b₁ changes the losses as the eigenvalue says, λ = mean ⟨b₁, M_i⟩².
    (u, v), eps = guard.directions.frames[0], 1e-2
    direction = (u @ guard.directions.basis[0].view(u.shape[1], v.shape[1]) @ v.T).float()
    weight = dict(model.named_parameters())[sites[0].weight]
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight.data += sign * eps * direction.T
            ends.append(per_sample_nll(model, batch))
            weight.data -= sign * eps * direction.T
        slopes = (ends[0] - ends[1]) / (2 * eps)
    assert float(slopes.square().mean()) == pytest.approx(float(guard.directions.eigenvalues[0]), rel=1e-2)


def test_names_are_public():
    assert {"AlignGuardConfig", "LoRAMitigator"} <= set(arisk.__all__)
