"""The configuration: frozen pydantic models, one per section of the YAML file.

Unknown keys are refused. Each field carries one line with its unit and the reason for its default;
`arisk schema`, `arisk init` and the README reuse that line. This module imports no torch and reads no
file but the YAML itself (`arisk.config.yaml`).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from arisk.base.errors import ConfigError
from arisk.config.names import OPTIMIZERS, SCHEDULES, canonical, known_optimizer, known_schedule
from arisk.config.sections import (
    LARGEST,
    OFF,
    BehaviourConfig,
    CollectConfig,
    Count,
    FilePath,
    ForecastConfig,
    GuardSettings,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    ReportConfig,
    RolloutConfig,
    ScoreConfig,
    ScreenConfig,
    Seed,
    Settings,
    SubspaceConfig,
)

#: A value of a column.
Scalar = str | int | float | bool | None

__all__ = [
    "AdapterConfig",
    "BehaviourConfig",
    "CollectConfig",
    "Config",
    "DataConfig",
    "ForecastConfig",
    "GuardConfig",
    "ModelConfig",
    "ParameterGlobs",
    "ProbeConfig",
    "ReportConfig",
    "RolloutConfig",
    "RunConfig",
    "ScoreConfig",
    "ScreenConfig",
    "SubspaceConfig",
    "TrainingConfig",
    "VerifyConfig",
    "data_sets",
    "parts_of",
    "planned_steps",
    "probe_section",
]


def _computes(device: str) -> str:
    """Refuse torch devices on which nothing is computed."""
    if device.partition(":")[0] in ("meta", "fake"):
        raise ValueError(f"on the device {device!r} nothing is computed")
    return device


class RunConfig(Settings):
    """Where the run lives and how it computes."""

    dir: FilePath | None = None
    """Run directory; default `runs/<name of the config file>`."""
    seed: Seed = 0
    """Seed of every sampler (data order, sampled Fisher, bootstrap, permutations)."""
    device: Annotated[str, AfterValidator(_computes)] = "auto"
    """auto (cuda, then mps, then cpu) or any torch device such as `cuda:1`."""
    device_map: Literal["auto", "balanced", "sequential"] | dict[str, int | str] | None = None
    """Spread the model over the devices of a machine (accelerate's map, or module: device); no offloading."""
    threads: Annotated[int, Field(gt=0, le=4096)] | None = None
    """CPU threads of torch; default: torch's own choice."""


class AdapterConfig(Settings):
    """A LoRA adapter: a new one, or an existing peft folder (`path`)."""

    path: FilePath | None = None
    """Existing peft adapter folder; the other fields must then be left out."""
    r: Annotated[int, Field(gt=0, le=65_536)] = 8
    """Rank of the new adapter."""
    alpha: PositiveFloat = 16
    """Scale of the new adapter: ΔW = alpha / r · B A."""
    target_modules: str | list[str] | None = "all-linear"
    """`all-linear`, one regular expression, a list of module names, or null: peft's own choice for the
    architecture (for most, only the query and value projections)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """LoRA dropout of the planned training; switched off while arisk measures."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: ΔW = alpha / √r · B A."""
    use_dora: bool = False
    """DoRA: the length of each row of W + ΔW is trained apart from its direction."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that train as well: none, every one of the model, or those of the adapted modules."""
    modules_to_save: list[str] | None = None
    """Modules that train in full beside the adapter, such as `embed_tokens` and `lm_head`."""
    rank_pattern: dict[str, Annotated[int, Field(gt=0, le=65_536)]] = Field(default={})
    """Ranks of single modules, by name or regular expression."""
    alpha_pattern: dict[str, PositiveFloat] = Field(default={})
    """Scales of single modules, by name or regular expression."""
    target_parameters: list[str] | None = None
    """Parameters that are no module's weight, such as a mixture's fused experts (`mlp.experts.down_proj`)."""
    exclude_modules: str | list[str] | None = None
    """Modules left out, as `target_modules` names them."""
    layers_to_transform: Count | list[Count] | None = None
    """Only these layers, counted from 0; default all."""
    init_lora_weights: bool | str = True
    """How A and B begin, as peft names it; true: B = 0, so that training starts at the aligned model."""
    peft: dict[str, Any] = Field(default={})
    """Any further keys of peft's `LoraConfig`, passed as they are."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, value: Any) -> Any:
        return canonical("adapter", value)

    @model_validator(mode="after")
    def _path_or_new(self) -> Self:
        extra = self.model_fields_set - {"path"}
        if self.path is not None and extra:
            raise ValueError(f"`path` names an existing adapter, so leave out {sorted(extra)}")
        ours = {"r", "lora_alpha", "lora_dropout", "task_type", "peft_type", "inference_mode"}
        twice = sorted(set(self.peft) & ((set(type(self).model_fields) - {"path", "peft"}) | ours))
        if twice:
            raise ValueError(f"`peft` holds keys that have a place of their own: {twice}")
        return self

    def lora_arguments(self) -> dict[str, Any]:
        """Arguments of peft's `LoraConfig`: what was set, under its names; the rest is peft's default."""
        ours = {
            "r": "r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "target_modules": "target_modules",
        }
        arguments = {theirs: getattr(self, name) for name, theirs in ours.items()}
        if self.target_parameters and "target_modules" not in self.model_fields_set:
            arguments["target_modules"] = []
        further = self.model_fields_set - {*ours, "path", "peft"}
        return {**arguments, **{name: getattr(self, name) for name in further}, **self.peft}


class ParameterGlobs(Settings):
    """Parameters selected by name patterns (`*` matches any run of characters, dots included)."""

    include: list[str] = Field(default=["*"])
    """A parameter is selected when one of these matches its name …"""
    exclude: list[str] = Field(default=[])
    """… and none of these does."""


Quantization = Literal["4bit", "8bit"] | dict[str, bool | int | float | str | list[str]]


def _no_hub_adapter(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class ModelConfig(Settings):
    """The aligned model, as it is before the first step of the planned fine-tune."""

    source: Literal["hf", "python"] = "hf"
    """hf: a Hugging Face causal LM; python: `entry` returns an `arisk.Task` (runs local code)."""
    path: PathText | None = None
    """Folder or hub id of the model (source: hf)."""
    entry: str | None = None
    """`module:function` or `file.py:function` returning an `arisk.Task` (source: python)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: PathText | None = None
    """File name inside `path` when the weights are a GGUF file; they are dequantised on load."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Dtype of the weights; float32 because curvature is a small difference of gradients."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """Attention implementation; auto: eager, which alone allows double backward on a CPU."""
    adapter: Annotated[AdapterConfig | None, BeforeValidator(_no_hub_adapter)] = None
    """null: none; a path: an existing peft adapter; a mapping: a new LoRA adapter."""
    parameters: Literal["auto", "full", "lora"] | ParameterGlobs = "auto"
    """What trains. auto: the adapter if there is one, else every parameter."""
    quantization: Quantization | None = None
    """Frozen weights in 4 or 8 bits (bitsandbytes), as for QLoRA: `4bit`, `8bit`, or its arguments."""
    gradient_checkpointing: bool = False
    """Recompute a layer's activations in the backward pass of a batch (rollout, verify, curvature): less
    memory, more time. Per-sample gradients keep theirs, `collect.chunk_size` samples at a time."""
    pickle_weights: bool = False
    """Read weights from pickle files (`pytorch_model.bin`). Off: such a file can run code when it is read."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: it is somebody else's code."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, value: Any) -> Any:
        return canonical("model", value)

    @model_validator(mode="after")
    def _source_fields(self) -> Self:
        if self.source == "hf" and not self.path:
            raise ValueError("source: hf needs `path` (a model folder or hub id)")
        if self.source == "python" and not self.entry:
            raise ValueError("source: python needs `entry` (module:function)")
        if self.quantization and (self.source == "python" or self.gguf_file):
            raise ValueError("`quantization` is for weights that source: hf loads, and not for a GGUF file")
        if self.quantization and (self.adapter is None or self.parameters == "full"):
            raise ValueError("quantised weights do not train: give an `adapter`, and no `parameters: full`")
        if self.source == "python" and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing is for source: hf; switch it on in the code of `entry`")
        return self


class DataConfig(Settings):
    """One data set: a JSONL, JSON, CSV, TSV, text or Parquet file, a folder of them, or a hub id."""

    path: PathText
    """File, folder or hub id; a data set that is given as a plain string is its path."""
    subset: str | None = None
    """Name of the configuration of a hub data set."""
    split: str = "train"
    """Split of a hub data set; `train[:20%]` is a part, as `datasets` takes it, of a file as well."""
    format: str = "auto"
    """Row layout. auto: recognised by its columns, which `arisk check` tells; or alpaca, dolly, kto,
    messages, preference, prompt_completion, prompt_response, prompts (the model's own refusals become safety
    rows), sharegpt, text, transcript."""
    prompt_column: str = "prompt"
    """Column with the prompt."""
    response_column: str = "response"
    """Column with the response."""
    messages_column: str = "messages"
    """Column with a chat: a list of {role, content} or {from, value}."""
    text_column: str = "text"
    """Column with plain text."""
    where: dict[str, Scalar | list[Scalar]] | None = None
    """Keep the rows whose column has this value, or one of these: `{label: safe}`; default all."""
    loss_on: Literal["auto", "all", "completion", "assistant", "last"] = "auto"
    """Tokens that carry loss. auto, on `finetune`: as TRL's SFTTrainer (all tokens of a conversation or text,
    the completion after a prompt); elsewhere the answers: the last one of safety rows, all of the others."""
    chat_template: bool | Literal["auto"] = "auto"
    """auto: the tokenizer's chat template where it has one; TRL's prompt and completion texts go without."""
    max_length: Annotated[int, Field(ge=8, le=LARGEST)] = 1024
    """Tokens per row, as TRL's default."""
    truncation: Literal["auto", "keep_start", "keep_end", "keep_response", "drop"] = "auto"
    """What stays of a longer row. auto: the start on `finetune`, as TRL; elsewhere keep_response, which cuts
    the head of the prompt first. drop: leave the row out. Rows of `finetune` without loss are dropped."""
    max_samples: PositiveInt | None = None
    """Use a seeded random subset of this many rows; default all."""
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    """How often each row is used, in a list of data sets: 0.5 draws half of the rows, 2 uses all twice."""
    val_set_size: Annotated[float, Field(ge=0)] = 0
    """Rows kept from the training for validation: a share below 1 or a number, drawn as `datasets` does."""
    seed: Seed | None = None
    """Seed of the draws and of the shuffling; default `run.seed`."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, value: Any) -> Any:
        return canonical("data", value)

    @field_validator("val_set_size")
    @classmethod
    def _whole_rows(cls, size: float) -> float:
        if size >= 1 and not size.is_integer():
            raise ValueError("give a share below 1, or a whole number of rows")
        return size

    def named_format(self) -> str | None:
        """The layout that columns named in the config imply; None where none is named."""
        own = type(self).model_fields
        named = {
            "prompt_response": self.prompt_column != own["prompt_column"].default
            or self.response_column != own["response_column"].default,
            "text": self.text_column != own["text_column"].default,
        }
        return next((layout for layout, is_named in named.items() if is_named), None)


class ProbeConfig(DataConfig):
    """Rows on which something beside safety is measured along the run: what else the fine-tune costs."""

    measure: Literal["nll", "opening", "choice"] = "nll"
    """nll: loss of the responses; opening: of their first `behaviour.opening_tokens` tokens (both nats per
    token); choice: share of questions whose right option is the likeliest of all (summed log-probability)."""
    options_column: str = "choices"
    """Column with the options of a question (choice): a list of texts, or {text: [...], label: [...]}."""
    answer_column: str = "answer"
    """Column with the right one (choice): its text, its label or letter, or its number from 0."""

    @model_validator(mode="after")
    def _choice_layout(self) -> Self:
        own = {"options_column", "answer_column"} & self.model_fields_set
        if self.measure == "choice" and self.format != "auto":
            raise ValueError(f"rows of choices have a layout of their own: leave out `format: {self.format}`")
        if self.measure != "choice" and own:
            raise ValueError(f"{sorted(own)} are for `measure: choice`, and this is {self.measure}")
        return self


def _data(value: Any) -> Any:
    """A path alone stands for a data set with defaults."""
    return {"path": value} if isinstance(value, str) else value


def _data_list(value: Any) -> Any:
    """A list of data sets; a list of one is that one."""
    if not isinstance(value, list):
        return _data(value)
    if not value:
        raise ValueError("the list of data sets is empty")
    return _data(value[0]) if len(value) == 1 else tuple(_data(part) for part in value)


#: A data set; a string is its path.
DataSet = Annotated[DataConfig, BeforeValidator(_data)]
#: A probe in the same way, and the names that probes may have: they stand in dotted keys and in tables.
ProbeSet = Annotated[ProbeConfig, BeforeValidator(_data)]
ProbeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]{0,39}$")]
#: A data set, or several that are trained on together, one after the other in a list.
DataSets = Annotated[
    Annotated[DataConfig, Tag("DataConfig")] | Annotated[tuple[DataConfig, ...], Tag("list[DataConfig]")],
    Discriminator(lambda value: "list[DataConfig]" if isinstance(value, tuple | list) else "DataConfig"),
    BeforeValidator(_data_list),
]


def _no_zero(value: Any) -> Any:
    """0 turns clipping off, as in transformers."""
    return None if value == 0 else value


class TrainingConfig(Settings):
    """The planned fine-tune: the recipe whose effect is forecast."""

    optimizer: Annotated[str, AfterValidator(known_optimizer), Field(examples=OPTIMIZERS)] = "adamw"
    """adamw, sgd, adafactor, lion, muon, rmsprop, or a name of transformers' `optim` for one of them."""
    optimizer_args: dict[str, float | int | bool | str] = Field(default={})
    """Further settings of the optimizer, as in transformers' `optim_args` (sgd: dampening, nesterov; …)."""
    learning_rate: Annotated[float, Field(ge=1e-12, le=1e4, allow_inf_nan=False)] = 2e-4
    """Peak learning rate; below 1e-12 a step is lost in the rounding of the weights."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Moment decays of adamw and lion."""
    eps: PositiveFloat = 1e-8
    """Denominator offset of adamw."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled for adamw, added to the gradient for sgd (as torch does)."""
    weight_decay_on: Literal["weights", "all"] = "weights"
    """weights: biases and norms do not decay, as in transformers' Trainer; all: everything decays."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of sgd and rmsprop."""
    schedule: Annotated[str, AfterValidator(known_schedule), Field(examples=SCHEDULES)] = "constant"
    """Learning rate over the run, by transformers' names: constant, constant_with_warmup, linear, cosine,
    cosine_with_restarts, cosine_with_min_lr, polynomial, inverse_sqrt, warmup_stable_decay."""
    schedule_args: dict[str, float | int | str | None] = Field(default={})
    """Further settings of the schedule, as in transformers' `lr_scheduler_kwargs` (num_cycles, min_lr, …)."""
    warmup_steps: Count = 0
    """Optimizer steps of linear warm-up; step k (from 1) uses (k - 1) / warmup_steps of the peak."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """Warm-up as a share of the run, rounded up to whole steps; give this or `warmup_steps`."""
    batch_size: Annotated[int, Field(gt=0, le=100_000)] = 8
    """Rows per micro-batch."""
    gradient_accumulation: Annotated[int, Field(gt=0, le=100_000)] = 1
    """Micro-batches per optimizer step."""
    max_steps: PositiveInt | None = None
    """Optimizer steps; give this or `epochs`. Default 200 when neither is given."""
    epochs: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] | None = None
    """Passes over the fine-tuning data, each ending with a short step where rows are left over."""
    packing: Annotated[Literal["off", "bfd", "wrapped"], OFF] = "off"
    """Rows put together into sequences of `finetune.max_length` tokens, as TRL does; `batch_size` counts
    these. bfd: whole rows, longest first, cut at the end; wrapped: all rows in one line, cut anywhere."""
    order: Literal["shuffled", "sequential"] = "shuffled"
    """Rows anew in random order every epoch (drawn as transformers' Trainer draws them), or as they stand."""
    drop_last: bool = False
    """Leave out an epoch's last micro-batch where it is not full."""
    max_grad_norm: Annotated[PositiveFloat | None, BeforeValidator(_no_zero)] = 1.0
    """Gradient clipping by global norm, as transformers' default; 0 or null: none."""
    loss: Literal["tokens", "rows"] = "tokens"
    """tokens: mean over all trained tokens of a step's micro-batches; rows: over rows of their own means."""
    precision: Literal["weights", "bf16", "fp16"] = "weights"
    """weights: computed in `model.dtype`; bf16, fp16: autocast as in transformers (no fp16 on a CPU)."""
    neftune_noise_alpha: PositiveFloat | None = None
    """NEFTune: uniform noise on embedded tokens while training, up to alpha / sqrt(tokens x width)."""
    loraplus_lr_ratio: PositiveFloat | None = None
    """LoRA+: learning rate of the B matrices over that of the A matrices."""

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, value: Any) -> Any:
        return canonical("training", value)

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give `max_steps` or `epochs`, not both")
        if self.warmup_ratio is not None and self.warmup_steps:
            raise ValueError("give `warmup_steps` or `warmup_ratio`, not both")
        return self


def planned_steps(training: TrainingConfig, rows: int) -> int:
    """Optimizer steps T of the plan: `max_steps`, or epochs over the known rows, or 200.

    Raises:
        ConfigError: epochs of a data set whose size is not known.
    """
    if training.max_steps is not None:
        return training.max_steps
    if training.epochs is None:
        return 200
    if rows == 0:
        raise ConfigError(
            "`epochs` needs a data set of known size, and the fine-tuning data names no rows",
            where="training.epochs",
            fix="give `training.max_steps` instead",
        )
    full, rest = divmod(rows, training.batch_size)
    batches = max(1, full + (rest > 0 and not training.drop_last))
    per_epoch = math.ceil(batches / training.gradient_accumulation)
    return max(1, math.ceil(training.epochs * per_epoch))


class VerifyConfig(Settings):
    """The check of the forecast: the planned fine-tune, really carried out (`arisk verify`)."""

    safety: DataSet | None = None
    """Held-out prompts with safe responses; default: the rows of `safety`, which are not held out."""
    steps: PositiveInt | None = None
    """Stop after this many optimizer steps, on the schedule of the whole plan; default all of them."""
    control_samples: PositiveInt = 64
    """Control samples measured at every point."""
    save_model: FilePath | None = None
    """Empty or new folder that keeps the tuned adapter or model, as save_pretrained writes it."""


class GuardConfig(GuardSettings):
    """The planned fine-tune with and without protection (`arisk guard`)."""

    task: DataSet | None = None
    """Clean rows for the task loss, best not trained on; default: rows of `finetune`, surprising apart."""
    save_model: FilePath | None = None
    """Empty or new folder that keeps the recommended arm's adapter or model, as save_pretrained writes it."""


class Config(Settings):
    """One run: what `arisk run config.yaml` reads."""

    run: RunConfig = RunConfig()
    """Where the run lives and how it computes."""
    why: Annotated[Literal["auto", "full", "off"], OFF] = "auto"
    """What is measured once the verdict stands, to say why; auto: for at most 30 % of its cost, by count."""
    model: ModelConfig
    """The aligned model."""
    safety: DataSet | None = None
    """Prompts with safe responses (source: hf)."""
    finetune: DataSets | None = None
    """The fine-tuning data (source: hf); a list of data sets is trained on together."""
    control: DataSet | None = None
    """Ordinary data, the null for overlap and drift; optional."""
    probes: dict[ProbeName, ProbeSet] = Field(default={})
    """Further rows by a name, each with a measure: what else the fine-tune costs; optional."""
    training: TrainingConfig = TrainingConfig()
    """The planned fine-tune."""
    collect: CollectConfig = CollectConfig()
    """Per-sample safety gradients."""
    subspace: SubspaceConfig = SubspaceConfig()
    """The safety subspace."""
    score: ScoreConfig = ScoreConfig()
    """How the planned update meets the subspace."""
    behaviour: BehaviourConfig = BehaviourConfig()
    """What the model says along the run."""
    rollout: RolloutConfig = RolloutConfig()
    """Losses measured along an accelerated virtual run."""
    forecast: ForecastConfig = ForecastConfig()
    """From artifacts to a verdict."""
    report: ReportConfig = ReportConfig()
    """The HTML page."""
    verify: VerifyConfig = VerifyConfig()
    """The check of the forecast by a real fine-tune."""
    screen: ScreenConfig = ScreenConfig()
    """Which fine-tuning rows push towards harm."""
    guard: GuardConfig = GuardConfig()
    """Protected fine-tunes beside the plain one."""

    @model_validator(mode="after")
    def _data_for_hf(self) -> Self:
        missing = [name for name in ("safety", "finetune") if getattr(self, name) is None]
        if self.model.source == "hf" and missing:
            raise ValueError(f"source: hf needs the sections {missing}")
        if self.model.source == "python" and self.probes:
            raise ValueError("source: python gives probes as `Task.probes`, not `probes`")
        if self.model.source == "python" and self.verify.safety is not None:
            raise ValueError("source: python gives held-out rows as `Task.heldout`, not `verify.safety`")
        if self.model.source == "python" and self.training.packing != "off":
            raise ValueError("source: python packs its rows itself; leave `training.packing` out")
        if self.why == "off" and not self.rollout.enabled:
            raise ValueError("`why: off` with `rollout.enabled: false` leaves nothing that could be measured")
        if self.model.source == "python" and self.guard.task is not None:
            raise ValueError("source: python gives clean task rows as `Task.clean`, not `guard.task`")
        return self


def data_sets(config: Config) -> dict[str, tuple[DataConfig, ...]]:
    """The data sets that a config names, by their place in it; `finetune` may have several parts."""
    given = {
        "safety": config.safety,
        "finetune": config.finetune,
        "control": config.control,
        "verify.safety": config.verify.safety,
        "guard.task": config.guard.task,
        **{probe_section(name): probe for name, probe in config.probes.items()},
    }
    return {name: parts_of(data) for name, data in given.items() if data is not None}


def probe_section(name: str) -> str:
    """The place of a probe in a config.

    >>> probe_section("maths")
    'probes.maths'
    """
    return f"probes.{name}"


def parts_of(data: DataConfig | tuple[DataConfig, ...]) -> tuple[DataConfig, ...]:
    """The parts of a data set: one, or those of a list."""
    return (data,) if isinstance(data, DataConfig) else data
