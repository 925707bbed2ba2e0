"""The configuration: frozen pydantic models, one per section of the YAML file.

Unknown keys are refused. Each field carries one line with its unit and the reason for its default;
`arisk schema`, `arisk init` and the README reuse that line. This module imports no torch and reads no
file but the YAML itself (`arisk.configfile`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from arisk.problems import config_error

__all__ = [
    "AdapterConfig",
    "CollectConfig",
    "Config",
    "DataConfig",
    "ForecastConfig",
    "ModelConfig",
    "ParameterGlobs",
    "PipelineConfig",
    "ReportConfig",
    "RunConfig",
    "ScoreConfig",
    "SubspaceConfig",
    "TrainingConfig",
]

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, attribute docstrings as descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class RunConfig(Section):
    """Where the run lives and how it computes."""

    dir: Path | None = None
    """Run directory; default `runs/<name of the config file>`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every sampler (data order, sampled Fisher, bootstrap, permutations)."""
    device: str = "auto"
    """auto (cuda, then mps, then cpu) or any torch device such as `cuda:1`."""
    threads: PositiveInt | None = None
    """CPU threads of torch; default: torch's own choice."""


class AdapterConfig(Section):
    """A LoRA adapter: a new one, or an existing peft folder (`path`)."""

    path: Path | None = None
    """Existing peft adapter folder; the other fields must then be left out."""
    r: PositiveInt = 8
    """Rank of the new adapter."""
    alpha: PositiveFloat = 16
    """Scale of the new adapter: ΔW = alpha / r · B A."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear`, one regular expression, or a list of module names."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """LoRA dropout of the planned training; switched off while arisk measures."""

    @model_validator(mode="after")
    def _path_or_new(self) -> Self:
        extra = self.model_fields_set & {"r", "alpha", "target_modules", "dropout"}
        if self.path is not None and extra:
            raise ValueError(f"`path` names an existing adapter, so leave out {sorted(extra)}")
        return self


class ParameterGlobs(Section):
    """Parameters selected by name patterns (`*` matches any run of characters, dots included)."""

    include: list[str] = ["*"]
    """A parameter is selected when one of these matches its name …"""
    exclude: list[str] = []
    """… and none of these does."""


def _no_hub_adapter(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class ModelConfig(Section):
    """The aligned model, as it is before the first step of the planned fine-tune."""

    source: Literal["hf", "python"] = "hf"
    """hf: a Hugging Face causal LM; python: `entry` returns an `arisk.Task` (runs local code)."""
    path: str | None = None
    """Folder or hub id of the model (source: hf)."""
    entry: str | None = None
    """`module:function` or `file.py:function` returning an `arisk.Task` (source: python)."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: str | None = None
    """File name inside `path` when the weights are a GGUF file; they are dequantised on load."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Dtype of the weights; float32 because curvature is a small difference of gradients."""
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    """Attention implementation; auto: eager, which alone allows double backward on a CPU."""
    adapter: Annotated[AdapterConfig | None, BeforeValidator(_no_hub_adapter)] = None
    """null: none; a path: an existing peft adapter; a mapping: a new LoRA adapter."""
    parameters: Literal["auto", "full", "lora"] | ParameterGlobs = "auto"
    """What trains. auto: the adapter if there is one, else every parameter."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: it is somebody else's code."""

    @model_validator(mode="after")
    def _source_fields(self) -> Self:
        if self.source == "hf" and not self.path:
            raise ValueError("source: hf needs `path` (a model folder or hub id)")
        if self.source == "python" and not self.entry:
            raise ValueError("source: python needs `entry` (module:function)")
        return self


class DataConfig(Section):
    """One data set: JSONL, JSON, CSV or Parquet file, or a hub id (through `datasets`)."""

    path: str
    """File or hub id."""
    split: str = "train"
    """Split of a hub data set."""
    format: Literal["prompt_response", "messages", "text"] = "prompt_response"
    """Row layout: two columns; a chat in `messages`; or plain text (loss on every token)."""
    prompt_column: str = "prompt"
    """Column with the prompt."""
    response_column: str = "response"
    """Column with the response; the loss is taken on its tokens only."""
    messages_column: str = "messages"
    """Column with a list of {role, content}; the last assistant turn is the response."""
    text_column: str = "text"
    """Column with plain text."""
    chat_template: bool | Literal["auto"] = "auto"
    """auto: the tokenizer's chat template where it has one."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens per row; longer rows lose the head of the prompt first, never the whole response."""
    max_samples: PositiveInt | None = None
    """Use a seeded random subset of this many rows; default all."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of that subset and of the shuffling; default `run.seed`."""


class TrainingConfig(Section):
    """The planned fine-tune: the recipe whose effect is forecast."""

    optimizer: Literal["sgd", "adamw"] = "adamw"
    """sgd (with `momentum`) or adamw (with `betas`, `eps`)."""
    learning_rate: PositiveFloat = 2e-4
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """AdamW moment decays."""
    eps: PositiveFloat = 1e-8
    """AdamW denominator offset."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled for adamw, added to the gradient for sgd (as torch does)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD momentum (no dampening, no Nesterov)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate decay after the warm-up, to zero at the last step."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up; step k (from 1) uses k / warmup_steps of the peak."""
    batch_size: PositiveInt = 8
    """Rows per micro-batch."""
    gradient_accumulation: PositiveInt = 1
    """Micro-batches per optimizer step."""
    max_steps: Annotated[int, Field(gt=0, le=10_000_000)] | None = None
    """Optimizer steps; give this or `epochs`. Default 200 when neither is given."""
    epochs: PositiveFloat | None = None
    """Passes over the fine-tuning data, turned into optimizer steps."""
    max_grad_norm: PositiveFloat | None = None
    """Gradient clipping by global norm; null: none."""

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give `max_steps` or `epochs`, not both")
        if self.optimizer == "adamw" and self.momentum:
            raise ValueError("`momentum` belongs to sgd; adamw takes `betas`")
        return self


class CollectConfig(Section):
    """Per-sample safety gradients and the Fisher matrix they span."""

    engine: Literal["auto", "hooks", "vmap", "loop"] = "auto"
    """auto: the fastest engine that covers the selection and agrees with `loop` on two samples."""
    fisher: Literal["empirical", "sampled"] = "empirical"
    """empirical: labels of the data; sampled: one label per position drawn from the model."""
    store: Literal["auto", "gradients", "gram"] = "auto"
    """gradients: keep them on disk; gram: only inner products, later stages run the model again."""
    chunk_size: PositiveInt = 8
    """Safety samples per forward and backward pass."""
    memory_budget_gb: PositiveFloat = 1.0
    """Memory for gradient blocks, on top of model and activations (GB)."""
    disk_budget_gb: PositiveFloat = 20.0
    """Disk for the gradient store (GB); auto falls back to `gram` above it."""


class SubspaceConfig(Section):
    """The low-rank safety subspace: leading eigenvectors of the Fisher matrix."""

    method: Literal["gram", "svd", "randomized_svd", "diag_topk"] = "gram"
    """gram: exact, in the dual, float64; the others for comparison."""
    max_rank: PositiveInt = 32
    """Upper limit of the rank."""
    rank: PositiveInt | None = None
    """Fixed rank; default: by `target_explained_variance`, at most `max_rank`."""
    target_explained_variance: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Smallest rank whose eigenvalues reach this share of the whole trace."""
    heldout_splits: PositiveInt = 20
    """Random half splits for the held-out energy."""
    top_weights: Annotated[int, Field(ge=0)] = 256
    """How many single weights with the largest Fisher diagonal are named."""


class ScoreConfig(Section):
    """How the planned update meets the safety subspace."""

    batches: Annotated[int, Field(ge=2)] = 8
    """Fine-tuning batches averaged for the update direction; two or more, to see their noise."""
    hvp_batches: PositiveInt = 4
    """Batches in each Hessian-vector product."""
    krylov_dim: Annotated[int, Field(ge=2)] | Literal["auto"] = "auto"
    """Lanczos steps of the local model; auto: P when P <= 64, else 12."""
    hvp: Literal["auto", "autograd", "finite_difference"] = "auto"
    """auto: double backward where the model allows it, else central differences."""
    nulls: Annotated[int, Field(ge=0)] = 99
    """Permutations of the update for the overlap's p-value; its floor is 1 / (nulls + 1)."""
    examples: Annotated[int, Field(ge=0)] = 64
    """Fine-tuning rows scored one by one (those of the first batches)."""
    probe_points: Annotated[int, Field(ge=0)] = 10
    """Points of the measured straight move along the update direction; 0 switches it off."""


class ForecastConfig(Section):
    """From artifacts to a verdict."""

    collapse_threshold: PositiveFloat = 0.1
    """Rise of the mean safety loss that counts as collapse (nats per response token)."""
    confidence: Fraction = 0.8
    """Nominal coverage of the intervals."""
    bootstrap_samples: PositiveInt = 400
    """Bootstrap draws over safety samples and fine-tuning batches."""
    elevated_probability: Fraction = 0.1
    """P(collapse within the plan) from which the verdict is at least elevated."""
    high_probability: Fraction = 0.5
    """P(collapse within the plan) from which the verdict is high."""
    alarm_fraction: Fraction = 0.3
    """A predicted peak above this share of the threshold is elevated whatever its probability."""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.elevated_probability > self.high_probability:
            raise ValueError("`elevated_probability` must not exceed `high_probability`")
        return self


class ReportConfig(Section):
    """The HTML page."""

    title: str | None = None
    """Title of the page; default: the run's name."""
    max_examples: PositiveInt = 12
    """Riskiest fine-tuning rows shown."""
    show_text: bool = True
    """Show prompts and responses; off: only their numbers (for confidential data)."""


class Config(Section):
    """One run: what `arisk run config.yaml` reads."""

    run: RunConfig = RunConfig()
    """Where the run lives and how it computes."""
    model: ModelConfig
    """The aligned model."""
    safety: DataConfig | None = None
    """Prompts with safe responses (source: hf)."""
    finetune: DataConfig | None = None
    """The fine-tuning data (source: hf)."""
    control: DataConfig | None = None
    """Ordinary data, the null for overlap and drift; optional."""
    training: TrainingConfig = TrainingConfig()
    """The planned fine-tune."""
    collect: CollectConfig = CollectConfig()
    """Per-sample safety gradients."""
    subspace: SubspaceConfig = SubspaceConfig()
    """The safety subspace."""
    score: ScoreConfig = ScoreConfig()
    """How the planned update meets the subspace."""
    forecast: ForecastConfig = ForecastConfig()
    """From artifacts to a verdict."""
    report: ReportConfig = ReportConfig()
    """The HTML page."""

    @model_validator(mode="after")
    def _data_for_hf(self) -> Self:
        missing = [name for name in ("safety", "finetune") if getattr(self, name) is None]
        if self.model.source == "hf" and missing:
            raise ValueError(f"source: hf needs the sections {missing}")
        return self


class PipelineConfig(Section):
    """Configuration of `arisk.AlignmentRiskPipeline`, for models and loaders given from Python."""

    def __init__(self, **values: Any) -> None:
        """Validate like the YAML.

        Raises:
            ConfigError: with every mistake.
        """
        try:
            super().__init__(**values)
        except ValidationError as err:
            raise config_error(type(self), err, "PipelineConfig") from err

    mode: Literal["full", "lora"] = "full"
    """full: every parameter that requires a gradient; lora: those named like LoRA weights."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every sampler."""
    training: TrainingConfig = TrainingConfig()
    """The planned fine-tune."""
    collect: CollectConfig = CollectConfig()
    """Per-sample safety gradients."""
    subspace: SubspaceConfig = SubspaceConfig()
    """The safety subspace."""
    score: ScoreConfig = ScoreConfig()
    """How the planned update meets the subspace."""
    forecast: ForecastConfig = ForecastConfig()
    """From artifacts to a verdict."""
