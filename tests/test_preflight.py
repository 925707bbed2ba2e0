"""A forecast from a live trainer: the command line's verdict, and a training that notices nothing."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch

import arisk
from arisk.base.artifacts import read_record
from arisk.base.errors import ConfigError, GateError, InconclusiveError, InputError
from arisk.base.terminal import StageDisplay
from arisk.catalogue import catalogue
from arisk.config.plan import AdapterConfig, Config
from arisk.config.python import PipelineConfig
from arisk.engine.run import run_stages
from arisk.forecast.record import ForecastResult
from arisk.models.from_trainer import planned_by, settings_of, task_of
from arisk.models.selection import attach_adapter

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")
FIXTURES = Path(__file__).parent.parent / "fixtures"
SEED = 3
#: As little as makes every stage run.
SMALL: dict[str, Any] = {
    "why": "full",
    "collect": {"engine": "hooks"},
    "score": {"batches": 4, "hvp_batches": 1, "probe_points": 1, "examples": 4, "krylov_dim": 3},
    "behaviour": {"prompts": 3, "ordinary_prompts": 0, "tokens": 6},
    "rollout": {"eval_samples": 8},
    "forecast": {"bootstrap_samples": 40},
}
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3,
    "max_steps": 8,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
}


def rows_of(name: str, count: int) -> list[dict[str, Any]]:
    """The first rows of a fixture, as messages."""
    lines = (FIXTURES / "data" / name).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines[:count]]
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in found
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Of the small aligned model."""
    return transformers.AutoTokenizer.from_pretrained(FIXTURES / "tiny-aligned")


@pytest.fixture(scope="module")
def safety(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows."""
    path = tmp_path_factory.mktemp("safety") / "safety.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows_of("safety.jsonl", 12)), encoding="utf-8")
    return path


def adapted() -> Any:
    """The small aligned model with an adapter, as the command line makes it with this seed."""
    model = transformers.AutoModelForCausalLM.from_pretrained(FIXTURES / "tiny-aligned", dtype=torch.float32)
    return attach_adapter(model, AdapterConfig(r=2, alpha=4), seed=SEED)


def sft(tokenizer: Any, folder: Path, **settings: Any) -> Any:
    """TRL's trainer on 21 chats."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    common = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "seed": SEED}
    common |= {"save_strategy": "no", "logging_steps": 2, "disable_tqdm": True, "max_length": 256}
    return trl.SFTTrainer(
        model=adapted(),
        args=trl.SFTConfig(**{**common, **TRAINING, **settings}),
        train_dataset=datasets.Dataset.from_list(rows_of("mixed.jsonl", 21)),
        processing_class=tokenizer,
    )


def plain(folder: Path, tokenizer: Any, data: Any = "rows", **settings: Any) -> Any:
    """transformers' own trainer on tokenised rows."""
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in ("One lamp.", "Two lamps and a rope.")]
    common = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "save_strategy": "no"}
    return transformers.Trainer(
        model=adapted(),
        args=transformers.TrainingArguments(**{**common, **TRAINING, "disable_tqdm": True, **settings}),
        train_dataset=rows if isinstance(data, str) else data,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def parameters(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all of them."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
def test_the_verdict_is_the_command_lines(
    packing: bool, tokenizer: Any, safety: Path, tmp_path: Path
) -> None:
    trainer = sft(tokenizer, tmp_path, packing=packing)
    report = arisk.preflight(trainer, safety=safety, config=SMALL)

    data = tmp_path / "finetune.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows_of("mixed.jsonl", 21)), encoding="utf-8")
    training = {**TRAINING, "packing": "bfd" if packing else "off"}
    config = Config.model_validate(
        {
            "run": {"seed": SEED},
            "model": {"path": str(FIXTURES / "tiny-aligned"), "adapter": {"r": 2, "alpha": 4}},
            "safety": {"path": str(safety)},
            "finetune": {"path": str(data), "max_length": 256},
            "training": training,
            **SMALL,
        }
    )
    run = tmp_path / "run"
    run_stages(catalogue(), config, run_dir=run, show=StageDisplay(quiet=True), command="", last="score")
    (folder,) = [path.parent for path in run.rglob("record.json") if "forecast" in str(path.parent.name)]
    told = read_record(folder, ForecastResult)
    assert report.verdict.level == told.verdict.level
    assert report.verdict.collapse_step == told.verdict.collapse_step
    for name, curve in told.forecasters.items():
        assert report.forecasted.forecasters[name].median == pytest.approx(list(curve.median), abs=1e-4), name
    assert report.verdict.probability == pytest.approx(told.verdict.probability, abs=1e-4)


def test_probes_are_forecast_beside_safety(tokenizer: Any, safety: Path, tmp_path: Path) -> None:
    """A file, rows in memory, and settings: each is rolled out and forecast under its name."""
    question = {"question": "What holds soup?", "choices": ["a bowl", "a lamp"], "answer": "a bowl"}
    (tmp_path / "asked.jsonl").write_text("\n".join([json.dumps(question)] * 3), encoding="utf-8")
    probes = {
        "small talk": FIXTURES / "data" / "control.jsonl",
        "first words": {"path": str(safety), "measure": "opening"},
        "in memory": rows_of("control.jsonl", 4),
        "asked": {"path": str(tmp_path / "asked.jsonl"), "measure": "choice"},
    }
    report = arisk.preflight(
        sft(tokenizer, tmp_path), safety=safety, probes=probes, config=SMALL | {"why": "off"}
    )
    assert [probe.name for probe in report.forecasted.probes] == list(probes)
    assert [probe.measure for probe in report.forecasted.probes] == ["nll", "opening", "nll", "choice"]
    with pytest.raises(ConfigError, match="should match pattern") as caught:
        arisk.preflight(sft(tokenizer, tmp_path), safety=safety, probes={"a.b": safety}, config=SMALL)
    assert "probes" in caught.value.where


def test_a_training_with_a_preflight_is_the_one_without(tokenizer: Any, safety: Path, tmp_path: Path) -> None:
    """Parameters, losses and random states, with dropout in the adapter and checkpoints switched on."""

    def trained(callback: Any = None, before: bool = False) -> tuple[Any, ...]:
        trainer = sft(tokenizer, tmp_path, gradient_checkpointing=True, neftune_noise_alpha=5.0)
        if callback is not None:
            trainer.add_callback(callback)
        if before:
            arisk.preflight(trainer, safety=rows_of("safety.jsonl", 6), config=SMALL)
            # `train` begins a new history; reporters have heard of it.
            assert [entry["step"] for entry in trainer.state.log_history if "arisk/level" in entry] == [0]
        trainer.train()
        losses = [
            {k: v for k, v in entry.items() if "loss" in k or "accuracy" in k or "grad" in k}
            for entry in trainer.state.log_history
            if "loss" in entry
        ]
        steps = [entry["step"] for entry in trainer.state.log_history if "arisk/level" in entry]
        assert steps == ([] if callback is None else [0])
        return parameters(trainer.model), losses, torch.get_rng_state(), random.random()

    callback = arisk.PreflightCallback(safety=safety, config=SMALL, watch_every=3)
    expected = trained()
    for found in (trained(callback), trained(before=True)):
        for name, value in expected[0].items():
            assert torch.equal(found[0][name], value), name
        assert found[1] == expected[1]
        assert torch.equal(found[2], expected[2])
        assert found[3] == expected[3]
    assert [step for step, _, _ in callback.history] == [0, 3, 6]
    assert callback.report is not None
    assert callback.history[-1][1] != 0.0


def medians(report: Any) -> dict[str, list[float]]:
    """Every forecaster's curve."""
    return {name: list(curve.median) for name, curve in report.forecasted.forecasters.items()}


def test_what_a_trainer_makes_ready_changes_no_forecast(tokenizer: Any, safety: Path, tmp_path: Path) -> None:
    """Autocast around `forward`, noise and checkpoint hooks: they are on when the callback is asked."""
    ready = {"bf16": True, "neftune_noise_alpha": 5.0, "gradient_checkpointing": True}
    control = rows_of("control.jsonl", 6)
    before = arisk.preflight(sft(tokenizer, tmp_path, **ready), safety=safety, control=control, config=SMALL)
    trainer = sft(tokenizer, tmp_path, **ready)
    callback = arisk.PreflightCallback(safety=safety, control=control, config=SMALL, watch_every=0)
    trainer.add_callback(callback)
    trainer.train()
    assert medians(callback.report) == medians(before)
    assert before.forecasted.training["precision"] == "bf16"
    assert before.forecasted.control_change is not None


class Stream(torch.utils.data.IterableDataset[Any]):
    """Rows without a length, anew at every reading."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_rows_without_a_length_are_read_in_their_order(tokenizer: Any, safety: Path, tmp_path: Path) -> None:
    """As a list of them is, whatever form the safety rows have."""
    datasets = pytest.importorskip("datasets")
    texts = [json.dumps(row["messages"])[:60] for row in rows_of("mixed.jsonl", 12)]
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts]
    settings = {"max_steps": 3, "gradient_accumulation_steps": 1}
    stream = plain(tmp_path, tokenizer, Stream(rows), **settings)
    listed = plain(tmp_path, tokenizer, rows[:6], train_sampling_strategy="sequential", **settings)
    as_dataset = datasets.Dataset.from_list(rows_of("safety.jsonl", 12))
    found = arisk.preflight(stream, safety=as_dataset, config=SMALL)
    assert medians(found) == medians(arisk.preflight(listed, safety=safety, config=SMALL))


def test_a_resumed_run_is_watched_without_a_forecast(tokenizer: Any, safety: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    plain(tmp_path, tokenizer, **settings).train()
    trainer = plain(tmp_path, tokenizer, **settings)
    callback = arisk.PreflightCallback(safety=safety, config=SMALL, fail_on="low", watch_every=1)
    trainer.add_callback(callback)
    with pytest.warns(UserWarning, match="goes on from step 2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert callback.report is None
    assert [step for step, _, _ in callback.history] == [2, 3, 4]


def test_what_is_found_reaches_whatever_the_trainer_reports_to(
    tokenizer: Any, safety: Path, tmp_path: Path
) -> None:
    seen: list[tuple[int, set[str]]] = []

    class Listener(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((state.global_step, {key for key in kwargs["logs"] if key.startswith("arisk/")}))

    trainer = plain(tmp_path, tokenizer, max_steps=3)
    trainer.add_callback(Listener())
    # One nat below nothing: every measurement is a warning.
    config = {**SMALL, "forecast": {**SMALL["forecast"], "collapse_threshold": 1e-9}}
    callback = arisk.PreflightCallback(safety=safety, config=config, watch_every=1, stop_at_threshold=True)
    trainer.add_callback(callback)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.train()
    assert "arisk/level" in dict(seen)[0]
    risen = [step for step, drift, _ in callback.history if drift > 1e-9]
    assert any({"arisk/safety_drift", "arisk/safety_loss"} <= keys for _, keys in seen)
    assert callback.stopped_at == (risen[0] if risen else None)
    assert bool(risen) == any("safety loss has risen" in str(w.message) for w in told)


def test_a_training_may_be_stopped_before_its_first_step(
    tokenizer: Any, safety: Path, tmp_path: Path
) -> None:
    trainer = plain(tmp_path, tokenizer)
    before = parameters(trainer.model)
    callback = arisk.PreflightCallback(safety=safety, config=SMALL, fail_on="low", watch_every=0)
    trainer.add_callback(callback)
    with pytest.raises((GateError, InconclusiveError), match="verdict is"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(value, before[name]) for name, value in parameters(trainer.model).items())


class Endless(torch.utils.data.IterableDataset[Any]):
    """Rows without a length."""

    def __iter__(self) -> Any:
        return itertools.repeat({"input_ids": [1, 2, 3]})


def without_rows(trainer: Any) -> None:
    """No train set."""
    trainer.train_dataset = None


def iterable(trainer: Any) -> None:
    """Rows and a plan without an end."""
    trainer.train_dataset, trainer.args.max_steps = Endless(), -1


def begun(trainer: Any) -> None:
    """A training behind it."""
    trainer.state.global_step = 7


def without_tokenizer(trainer: Any) -> None:
    """Nothing to write safety rows with."""
    trainer.processing_class = None


def with_optimizer(trainer: Any) -> None:
    """One that the arguments do not describe."""
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("broken", "what", "fix"),
    [
        (without_rows, "no train set", "train_dataset"),
        (iterable, "max_steps", "set `max_steps`"),
        (begun, "7 optimizer steps", "before `train"),
        (without_tokenizer, "no tokenizer", "processing_class"),
        (with_optimizer, "SGD", "config="),
    ],
)
def test_a_trainer_that_cannot_be_forecast_is_one_error(
    broken: Any, what: str, fix: str, tokenizer: Any, safety: Path, tmp_path: Path
) -> None:
    trainer = plain(tmp_path, tokenizer)
    broken(trainer)
    with pytest.raises(ConfigError) as told:
        arisk.preflight(trainer, safety=safety, config=SMALL)
    assert what in told.value.what
    assert fix in told.value.fix


def test_other_losses_than_of_the_next_token_are_one_error(
    tokenizer: Any, safety: Path, tmp_path: Path
) -> None:
    trainer = plain(tmp_path, tokenizer)
    trainer.data_collator = lambda rows: {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "labels": torch.tensor([[-100, 9, 3]]),
    }
    with pytest.raises(InputError, match="another token"):
        arisk.preflight(trainer, safety=safety, config=SMALL)
    with pytest.raises(ConfigError, match="no transformers Trainer"):
        arisk.preflight(object(), safety=safety)


class BasePlugin:
    """The hooks that axolotl documents for plugins; each does nothing."""

    def register(self, cfg: Any) -> None: ...
    def get_input_args(self) -> str | None: ...
    def pre_model_load(self, cfg: Any) -> None: ...
    def post_trainer_create(self, cfg: Any, trainer: Any) -> None: ...
    def create_optimizer(self, cfg: Any, trainer: Any) -> None: ...

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        return []

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        return []


class Answering(dict[str, Any]):
    """A mapping that answers None for what it lacks, at any depth, as axolotl's config does."""

    def __init__(self, **values: Any) -> None:
        super().__init__({k: Answering(**v) if isinstance(v, dict) else v for k, v in values.items()})

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def loaded_plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin as axolotl loads it: the module by name, the class in it, and an instance of that."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    module, _, kind = "arisk.in_trainer.AxolotlPlugin".rpartition(".")
    return getattr(importlib.import_module(module), kind)()


def test_axolotl_loads_the_plugin_and_trains_with_its_callback(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Any, safety: Path, tmp_path: Path
) -> None:
    plugin = loaded_plugin(monkeypatch)
    assert isinstance(plugin, BasePlugin)
    module, _, kind = plugin.get_input_args().rpartition(".")
    added = getattr(importlib.import_module(module), kind)
    settings = {"safety": str(safety), "watch_every": 4, "config": SMALL}
    whole = pydantic.create_model("Config", __base__=(added,), base_model=(str, ...))
    cfg = Answering(**whole(base_model="m", arisk=settings).model_dump())
    trainer = sft(tokenizer, tmp_path)
    plugin.register(cfg)
    assert plugin.add_callbacks_pre_trainer(cfg, trainer.model) == []
    (callback,) = plugin.add_callbacks_post_trainer(cfg, trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.report is not None
    assert [step for step, *_ in callback.history] == [0, 4, 8]


@pytest.mark.parametrize(
    "given", [None, {}, {"safety": "s.jsonl", "harm": 1}, {"safety": "s", "fail_on": "no"}]
)
def test_a_wrong_section_of_the_plugin_is_one_error(monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    with pytest.raises(ConfigError):
        loaded_plugin(monkeypatch).add_callbacks_post_trainer(Answering(arisk=given), None)


def test_rows_that_something_else_puts_together_are_refused(
    tokenizer: Any, safety: Path, tmp_path: Path
) -> None:
    class Multipack(torch.utils.data.BatchSampler):
        """Batches of its own making."""

    trainer = plain(tmp_path, tokenizer)
    sampler = Multipack(torch.utils.data.SequentialSampler(trainer.train_dataset), 2, drop_last=False)
    loader = torch.utils.data.DataLoader(trainer.train_dataset, batch_sampler=sampler)
    trainer.get_train_dataloader = lambda: loader
    with pytest.raises(ConfigError, match="Multipack decides which rows share a micro-batch") as told:
        arisk.preflight(trainer, safety=safety, config=SMALL)
    assert "arisk init --from" in told.value.fix


def test_prompts_alone_are_answered_by_the_trainers_model(
    tokenizer: Any, safety: Path, tmp_path: Path
) -> None:
    trainer = plain(tmp_path, tokenizer)
    trainer.model.train()
    rows = [json.loads(line)["messages"] for line in safety.read_text(encoding="utf-8").splitlines()]
    prompts = [*(turns[0]["content"] for turns in rows[:4]), "how do i grow tulips ?"]
    planned = planned_by(trainer)
    settings, notes = settings_of(planned, PipelineConfig())
    task = task_of(planned, settings, [{"prompt": prompt} for prompt in prompts], None, notes)
    assert sorted(row["prompt"] for row in task.safety.rows) == sorted(prompts[:4])
    assert all("cannot" in row["response"] or "not" in row["response"] for row in task.safety.rows)
    assert all(module.training for module in trainer.model.modules())
