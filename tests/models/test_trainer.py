"""The mixin in a real Trainer: the penalty acts once per optimizer step, whatever is accumulated."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from arisk.models.trainer import GuardedTrainerMixin

transformers = pytest.importorskip("transformers")
# peft asks transformers for a name that transformers itself calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


class Pull:
    """A penalty with a known gradient: 1 for every entry of one parameter."""

    def __init__(self, parameter):
        self.parameter = parameter

    def penalty(self):
        return type("Terms", (), {"total": self.parameter.sum()})()


class Loss(nn.Module):
    """A model whose loss does not see `theta`, with a Trainer's signature."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(3))
        self.other = nn.Parameter(torch.zeros(1))

    def forward(self, x, **kwargs):
        return {"loss": (self.other * x).mean(), "logits": x}


class Guarded(GuardedTrainerMixin, transformers.Trainer):
    pass


def own_loss(outputs, labels, num_items_in_batch=None):
    """The trainer takes a loss of the caller as normalised over the accumulated batch."""
    return outputs["loss"]


@pytest.mark.parametrize("loss_func", [None, own_loss])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_steps_move_the_parameter_by_two_gradients(tmp_path, accumulation, loss_func):
    model = Loss()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    rows = [{"x": torch.ones(1)} for _ in range(4)]
    trainer = Guarded(
        model=model,
        args=arguments,
        train_dataset=rows,
        mitigator=Pull(model.theta),
        compute_loss_func=loss_func,
    )
    with torch.random.fork_rng():
        trainer.train()
    assert torch.allclose(model.theta, torch.full((3,), -0.2))
    model.eval()
    assert float(trainer.compute_loss(model, {"x": torch.zeros(1)}).detach()) == 0


def arguments(folder, **changes):
    values = {
        "output_dir": str(folder),
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**{**values, **changes})


def tiny():
    """A one-layer Llama with a peft adapter, its rows, and safety samples."""
    peft = pytest.importorskip("peft")
    from arisk.base.task import SampleSet
    from arisk.models.losses import per_sample_nll

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        base = transformers.LlamaForCausalLM(config)
        adapted = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", lora_dropout=0.1)
        model = peft.get_peft_model(base, adapted)
        ids = torch.randint(1, 32, (24, 8))
    batch = {"input_ids": ids[:8], "attention_mask": torch.ones(8, 8, dtype=torch.long), "labels": ids[:8]}
    rows = [{"input_ids": row, "labels": row} for row in ids[8:]]
    return model, rows, SampleSet("safety", [batch], per_sample_nll)


def test_a_real_trainer_with_the_mitigator_drifts_less_along_the_guarded_directions(tmp_path):
    from arisk.guard import AlignGuardConfig, build_mitigator

    drifts = {}
    for weight in (0.0, 1e5):
        model, rows, safety = tiny()
        settings = AlignGuardConfig(lambda_a=weight, lambda_t=0, lambda_nc=0, rank=4, width=64)
        guard = build_mitigator(model, safety, settings)
        arms = arguments(tmp_path, optim="adamw_torch")
        with torch.random.fork_rng():
            trainer = Guarded(model=model, args=arms, train_dataset=rows, mitigator=guard)
            done = trainer.train()
        assert done.global_step == 8
        aligned, _, _ = tiny()
        probe = build_mitigator(aligned, safety, settings.model_copy(update={"lambda_a": 1.0}))
        aligned.load_state_dict(model.state_dict())
        drifts[weight] = float(probe.penalty().fisher.detach())
    assert 0 < drifts[1e5] < 0.7 * drifts[0.0]


def test_the_watch_measures_logs_and_stops(tmp_path):
    from arisk.guard import mean_loss
    from arisk.models.trainer import drift_watch

    model, rows, safety = tiny()
    measure = mean_loss(safety)
    model.eval()
    start = measure(model)
    model.train()
    only = drift_watch(measure, every=3)
    with torch.random.fork_rng():
        trainer = transformers.Trainer(
            model=model, args=arguments(tmp_path), train_dataset=rows, callbacks=[only]
        )
        trainer.train()
    assert [step for step, _ in only.history] == [3, 6, 8]
    assert only.stopped_at is None
    model.eval()
    assert only.history[-1][1] == pytest.approx(measure(model) - start, abs=1e-6)
    logged = [entry for entry in trainer.state.log_history if "safety_drift" in entry]
    assert [(entry["step"], entry["safety_drift"]) for entry in logged] == only.history
    model, rows, safety = tiny()
    strict = drift_watch(lambda _: float("nan") if strict.history else 1.0, every=3, threshold=0.5)
    with torch.random.fork_rng():
        trainer = transformers.Trainer(
            model=model, args=arguments(tmp_path), train_dataset=rows, callbacks=[strict]
        )
        done = trainer.train()
    assert done.global_step == strict.stopped_at == 6
    assert model.training


def test_a_watch_that_never_looks_is_refused():
    from arisk.base.errors import ConfigError
    from arisk.models.trainer import drift_watch

    with pytest.raises(ConfigError, match="every"):
        drift_watch(lambda _: 0.0, every=0)


def test_two_processes_end_with_the_weights_of_one(tmp_path):
    """Each sees half of every batch: rows, penalties and gradients come to what one process makes of all."""
    from tests.models.several import KINDS, trained

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.models.several", str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "weights.safetensors")
    for kind in KINDS:
        for name, weight in trained(kind, tmp_path / "out", 4).items():
            torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5, "max_steps": 4},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=["drop_last", "persistent workers", "grouped"],
)
def test_constrained_tokens_see_every_row_whatever_the_loaders_do(tmp_path, changes):
    from tests.models.several import Constrained, still

    model, rows, _ = still()
    settings = arguments(tmp_path, **{"max_steps": 2, **changes})
    with torch.random.fork_rng():
        trainer = Constrained(model=model, args=settings, train_dataset=rows, eval_dataset=rows[:1])
        before = torch.get_rng_state()
        trainer.measure_rows()
        assert torch.equal(torch.get_rng_state(), before)
        trainer.train()
    assert len(trainer.reference) == len(rows)
    assert len(trainer.get_eval_dataloader().dataset) == 1


def test_constrained_tokens_read_a_stream_as_far_as_the_plan_goes(tmp_path):
    from tests.models.several import Constrained, still

    model, rows, _ = still()

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return itertools.cycle(rows)

    with torch.random.fork_rng():
        trainer = Constrained(model=model, args=arguments(tmp_path, max_steps=2), train_dataset=Stream())
        trainer.train()
    assert len(trainer.reference) == 2 * 4
