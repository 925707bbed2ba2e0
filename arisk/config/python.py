"""Settings built from Python: the sections of the YAML, and the peer package's names for some of them.

Unlike the YAML's they take assignment (`config.fisher.gradient_collection = "vmap"`), each validated
as it is made. `PipelineConfig.collect_settings` and `subspace_settings` are the one place where the
names of `fisher` are turned into those of the stages.
"""

from __future__ import annotations

import difflib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import core_schema
from typing_extensions import Self

from arisk.base.errors import ConfigError
from arisk.config.plan import TrainingConfig, VerifyConfig
from arisk.config.sections import (
    OFF,
    BehaviourConfig,
    CollectConfig,
    ForecastConfig,
    GuardSettings,
    PositiveInt,
    RolloutConfig,
    ScoreConfig,
    ScreenConfig,
    Seed,
    Settings,
    SubspaceConfig,
)
from arisk.config.yaml import config_error

__all__ = ["LORA_MARKERS", "FisherConfig", "PipelineConfig", "PythonSettings"]

#: A parameter whose name contains one of these (case ignored) belongs to a LoRA adapter.
LORA_MARKERS = ("lora_", "lora_A", "lora_B")

S = TypeVar("S", bound=Settings)

#: Settings of the peer package that arisk does not have, and what holds instead.
DROPPED = {
    "max_parameters": "leave it out: arisk has no limit on parameters",
    "device": "leave it out: a model is measured on the device it is on",
    "auto_probe_samples": "leave it out: engines are always checked against the loop on two samples",
    "auto_probe_atol": "leave it out: the accepted error follows from the dtype",
    "auto_probe_rtol": "leave it out: the accepted error follows from the dtype",
    "randomized_oversample": 'leave it out; `subspace_method = "gram"` is exact and faster',
    "randomized_niter": 'leave it out; `subspace_method = "gram"` is exact and faster',
    "learning_rate": "set `training.learning_rate`",
    "curvature": "set `score.hvp_batches`",
    "max_steps": "set `training.max_steps`",
    "step_size": "set `training.learning_rate`",
    "collapse_loss_threshold": "set `forecast.collapse_threshold`",
    "h_type": "set `task_metric`",
}


#: Whether a section is being built, which builds those inside it.
_building: ContextVar[bool] = ContextVar("building", default=False)


class PythonSettings(Settings):
    """Base of settings that are built from Python: assignable, mistakes told like those of the YAML."""

    model_config = ConfigDict(frozen=False, validate_assignment=True)

    def __init__(self, **values: Any) -> None:
        """Validate like the YAML.

        Raises:
            ConfigError: with every mistake.
        """
        name = type(self).__name__.removeprefix("_")
        for key in values:
            if key in DROPPED and key not in type(self).model_fields:
                raise ConfigError(f"there is no setting `{key}`", where=name, fix=DROPPED[key])
        outermost = _building.set(True) if not _building.get() else None
        try:
            super().__init__(**values)
        except ValidationError as err:
            # The outermost section tells the mistakes of all inside it.
            if outermost is None:
                raise
            raise config_error(type(self), err, name) from err
        finally:
            if outermost is not None:
                _building.reset(outermost)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign one setting; a refused value leaves the old one.

        Raises:
            ConfigError: no such setting, or not a value it takes.
        """
        fields = type(self).model_fields
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=1)
            fix = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(sorted(fields))}"
            raise ConfigError(
                f"there is no setting `{name}`",
                where=type(self).__name__.removeprefix("_"),
                fix=DROPPED.get(name, fix),
            )
        before, given = dict(self.__dict__), set(self.model_fields_set)
        building = _building.set(True)
        try:
            super().__setattr__(name, value)
        except ValidationError as err:
            # A check over several fields runs when the value is in place already.
            for field, old in before.items():
                object.__setattr__(self, field, old)
            self.__pydantic_fields_set__.clear()
            self.__pydantic_fields_set__.update(given)
            raise config_error(type(self), err, type(self).__name__.removeprefix("_")) from err
        finally:
            _building.reset(building)


def _as_mapping(value: Any) -> Any:
    """A frozen section given for an assignable one: only what was set in it."""
    if isinstance(value, BaseModel) and not isinstance(value, PythonSettings):
        return value.model_dump(exclude_unset=True)
    return value


_assignable_forms: dict[type[Settings], Any] = {}


def _assignable(section: type[S]) -> type[S]:
    """The one form of a section that is built from Python, under its name without "Config"."""
    if section not in _assignable_forms:
        name = section.__name__.removesuffix("Config").removesuffix("Settings")
        _assignable_forms[section] = create_model(
            f"_{name}", __base__=(section, PythonSettings), __doc__=section.__doc__
        )
    return _assignable_forms[section]


@dataclass(frozen=True)
class _Assignable:
    """Marks a field that holds the assignable form of its section, whatever form was given."""

    def __get_pydantic_core_schema__(
        self, source: type[Settings], handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_before_validator_function(_as_mapping, handler(_assignable(source)))


class FisherConfig(PythonSettings):
    """The safety Fisher matrix under the peer package's names; what is set here wins."""

    gradient_collection: Literal["auto", "hooks", "vmap", "loop"] = "auto"
    """Engine of the per-sample gradients (`collect.engine`)."""
    subspace_method: Literal["gram", "svd", "randomized_svd", "diag_topk"] = "gram"
    """How the eigenpairs are found (`subspace.method`)."""
    vmap_chunk_size: PositiveInt | None = None
    """Samples per forward and backward pass, whatever the engine (`collect.chunk_size`)."""
    target_explained_variance: Annotated[float, Field(gt=0, le=1)] | None = 0.9
    """Share of the whole trace that the rank reaches (`subspace.target_explained_variance`); None: `top_rank`
    alone decides."""
    top_rank: PositiveInt = 32
    """Upper limit of the rank (`subspace.max_rank`)."""
    top_weight_count: Seed = 256
    """Single weights that are named (`subspace.top_weights`)."""
    max_samples: PositiveInt | None = None
    """Use the first so many safety samples; default all of them."""
    parameter_names: list[str] | None = None
    """Exactly these parameters; default by `mode`."""


class PipelineConfig(PythonSettings):
    """Configuration of `arisk.AlignmentRiskPipeline`, for models and loaders given from Python."""

    mode: Literal["full", "lora"] = "full"
    """full: every parameter that requires a gradient; lora: those named like LoRA weights."""
    lora_name_markers: tuple[str, ...] = LORA_MARKERS
    """What the names of LoRA weights contain, case ignored."""
    require_lora_match: bool = True
    """Off: a model without LoRA weights gives a report that is skipped, instead of an error."""
    seed: Seed = 0
    """Seed of every sampler, and of the random state that loaders see."""
    fisher: FisherConfig = Field(default_factory=FisherConfig)
    """The safety Fisher matrix, under the names of the peer package."""
    training: Annotated[TrainingConfig, _Assignable()] = Field(default_factory=_assignable(TrainingConfig))
    """The planned fine-tune."""
    collect: Annotated[CollectConfig, _Assignable()] = Field(default_factory=_assignable(CollectConfig))
    """Per-sample safety gradients."""
    subspace: Annotated[SubspaceConfig, _Assignable()] = Field(default_factory=_assignable(SubspaceConfig))
    """The safety subspace."""
    score: Annotated[ScoreConfig, _Assignable()] = Field(default_factory=_assignable(ScoreConfig))
    """How the planned update meets the subspace."""
    behaviour: Annotated[BehaviourConfig, _Assignable()] = Field(default_factory=_assignable(BehaviourConfig))
    """What the model says along the run."""
    why: Annotated[Literal["auto", "full", "off"], OFF] = "full"
    """What is measured beside the verdict, to say why; auto: for at most 30 % of its cost, by count."""
    rollout: Annotated[RolloutConfig, _Assignable()] = Field(default_factory=_assignable(RolloutConfig))
    """Losses measured along an accelerated virtual run."""
    forecast: Annotated[ForecastConfig, _Assignable()] = Field(default_factory=_assignable(ForecastConfig))
    """From artifacts to a verdict."""
    verify: Annotated[VerifyConfig, _Assignable()] = Field(default_factory=_assignable(VerifyConfig))
    """The check of the forecast by a real fine-tune."""
    screen: Annotated[ScreenConfig, _Assignable()] = Field(default_factory=_assignable(ScreenConfig))
    """Which fine-tuning rows push towards harm (`arisk.screen`)."""
    guard: Annotated[GuardSettings, _Assignable()] = Field(default_factory=_assignable(GuardSettings))
    """The planned fine-tune with and without protection (`arisk.protect`)."""

    @model_validator(mode="after")
    def _loaders_hold_the_data(self) -> Self:
        if self.verify.safety is not None:
            raise ValueError("held-out rows come as `Task.heldout` here, not as `verify.safety`")
        return self

    @property
    def collect_settings(self) -> CollectConfig:
        """`collect`, with what was set in `fisher`."""
        return self.collect.model_copy(
            update=self._given(gradient_collection="engine", vmap_chunk_size="chunk_size")
        )

    @property
    def subspace_settings(self) -> SubspaceConfig:
        """`subspace`, with what was set in `fisher`."""
        update = self._given(
            subspace_method="method",
            target_explained_variance="target_explained_variance",
            top_rank="max_rank",
            top_weight_count="top_weights",
        )
        if self.fisher.target_explained_variance is None:
            # The whole trace is reached by no smaller rank.
            update["target_explained_variance"] = 1.0
        return self.subspace.model_copy(update=update)

    def _given(self, **names: str) -> dict[str, Any]:
        """Values set in `fisher`, by the names that stages know them under."""
        found = {ours: getattr(self.fisher, name) for name, ours in names.items()}
        wanted = {ours for name, ours in names.items() if name in self.fisher.model_fields_set}
        return {ours: value for ours, value in found.items() if ours in wanted and value is not None}
