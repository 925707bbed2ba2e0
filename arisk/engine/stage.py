"""What a stage is: one object that says all the engine, the command line, check and report know of it.

Stages are data with a few functions. Heavy parts load when they are used: naming a stage loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arisk.base.errors import ConfigError

if TYPE_CHECKING:
    from arisk.base.task import Task
    from arisk.config.plan import Config
    from arisk.engine.job import Job
    from arisk.engine.rundir import RunDir

__all__ = [
    "FORWARDS",
    "OVER_FINETUNE",
    "SOFTMAX",
    "Catalogue",
    "Cost",
    "CostScene",
    "Stage",
    "StageOption",
    "cost_of",
    "forward_tokens",
    "named",
    "steps_option",
    "where_hidden",
]


def named(place: str) -> Any:
    """What `package.module:name` names, imported now.

    >>> named("math:pi") > 3
    True
    """
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Cost:
    """What a stage takes, by count.

    Attributes:
        passes: passes of the model by kind, as `arisk.cost.estimate` times them.
        seconds: what else it takes, as a rule of thumb.
        memory_gb: peak resident memory of the process in this stage.
        device_gb: peak memory on the model's device; None on the CPU or where the stage runs no model.
        disk_gb: what it leaves in the run directory, where that is worth a word.
        notes: what else `arisk check` says of it, by topic; `warnings`: what does not fit, with a remedy.
    """

    passes: Mapping[str, float] = field(default_factory=dict[str, float])
    seconds: float = 0.0
    memory_gb: float = 0.0
    device_gb: float | None = None
    disk_gb: float = 0.0
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class CostScene:
    """What a stage's cost is counted from.

    Attributes:
        task: the model with its data.
        config: the resolved config.
        run_dir: where the run would live.
        seconds: of one pass of each kind, timed here; with "engine" for choosing the gradient engine.
        memory: peak memory of this process (GB) by kind of pass.
        device: the same on the model's device; empty on the CPU.
        loading: seconds that loading the model and the data took.
    """

    task: Task
    config: Config
    run_dir: Path
    seconds: Mapping[str, float]
    memory: Mapping[str, float]
    device: Mapping[str, float]
    loading: float = 0.0
    #: What several stages count from the same probe.
    probed: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class StageOption:
    """An option of a stage's own verb, which sets one config value.

    Attributes:
        name: as typed, without the dashes; `kind` its type.
        setting: the dotted config key it sets.
        help: one sentence.
        kind: what the shell reads.
        minimum: smallest value allowed, for numbers.
        metavar: what stands for the value in the help; None: made from the type.
        parse: from what was typed to the value.
        shown: whether the report has to be asked for with it as well, since it decides what the record holds.
        anew: whether who gives it wants the stage carried out even where its record is fresh.
    """

    name: str
    setting: str
    help: str
    kind: type = str
    minimum: int | None = None
    metavar: str | None = None
    parse: Callable[[Any], Any] | None = None
    shown: bool = False
    anew: bool = False


def steps_option(setting: str) -> StageOption:
    """`--steps` of a stage that really trains."""
    told = "Stop after this many steps, on the schedule of the whole plan; a run that went further serves."
    return StageOption("steps", setting, told, kind=int, minimum=1)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: the stage, its folder and its verb.
        version: raised whenever the stage's numbers change.
        help: what it does, one sentence for its verb.
        run: carries it out on a job, writes its files into the workspace, returns its record or None.
        upstream: stages whose outputs it reads.
        config: dotted config values it depends on. Device and threads are none: numbers do not depend on
            them beyond rounding.
        config_also: further ones, by the config.
        inputs: fingerprints it depends on.
        shows: stages whose outputs it includes where they are fresh; they may come later in the order.
        optional: run only when asked for by name.
        explains: whether under this config it only says why: it comes after the report has told what was
            decided, and `why: off` leaves it out. None: never.
        settled: the config as this stage takes it once stages before it have run; None where what they found
            leaves it out. It decides the key.
        reach: dotted config value that says how far the stage goes. A stored stage belongs to the plan
            whatever its reach; only who asks for the stage by name insists on one.
        parallel: all processes of a run take part; else the first one alone.
        reusable: may be taken from another run directory that has it with the same key.
        resume_files: patterns of workspace files that serve resuming only and are not committed.
        record: `module:class` of its record; None where it has none.
        section: what it shows on the report (a `report.page.Section`), from a job and what sections of later
            stages share; None for nothing, as where an optional stage has not been run.
        shown: dotted config values that change what it shows, and not what it holds.
        cost: what it will take, from a `CostScene`, or where that function is; None: next to nothing.
        before: refuses, before hours are spent, what this stage would refuse at its end.
        options: of its own verb, for optional stages.
        example: options in the example of its help.
        found: plain values of its record for `--json`, from its folder and the config, for optional stages.
        text: `module:function` of what its verb prints, from an `AskedOutcome`, for optional stages.
        beside: its values are read from the report's summary where there is one, as more stands there.
    """

    name: str
    version: int
    help: str
    run: Callable[[Job, Path], Any]
    upstream: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    config_also: Callable[[Config], tuple[str, ...]] | None = None
    inputs: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()
    optional: bool = False
    explains: Callable[[Config], bool] | None = None
    settled: Callable[[Config, RunDir], Config | None] | None = None
    reach: str | None = None
    parallel: bool = False
    reusable: bool = True
    resume_files: tuple[str, ...] = ()
    record: str | None = None
    section: Callable[[Job, Mapping[str, Any]], Any] | None = None
    shown: tuple[str, ...] = ()
    cost: str | Callable[[CostScene], Cost] | None = None
    before: Callable[[Config], None] | None = None
    options: tuple[StageOption, ...] = ()
    example: str = ""
    found: Callable[[Path, Config], Mapping[str, Any]] | None = None
    text: str | None = None
    beside: bool = False


#: Forward passes in a pass of each kind, by floating-point operations: a backward pass counts as two.
FORWARDS = {
    "forward rows": 1.0,
    "gradient rows": 3.0,
    "single-row gradients": 3.0,
    "curvature rows": 6.0,
}
#: The same of a softmax over given outputs, by measured time.
SOFTMAX = 0.1
#: Kinds of pass over fine-tuning rows; the others are over safety rows.
OVER_FINETUNE = ("gradient rows", "curvature rows")


def forward_tokens(task: Task, passes: Mapping[str, float]) -> float:
    """What passes take in forward passes of one token; rows whose tokens are unknown count alike."""
    found = passes.get("answer tokens", 0.0)
    for kind, forwards in {**FORWARDS, "output losses": SOFTMAX}.items():
        samples = task.finetune if kind in OVER_FINETUNE else task.safety
        found += forwards * passes.get(kind, 0.0) * float(samples.statistics.get("tokens_mean", 1.0))
    return found


def where_hidden(*judged: str) -> Callable[[Config], tuple[str, ...]]:
    """`config_also` of a stage whose record holds texts of the data, or of the model.

    Where `report.show_text` is off it holds none: what they say is judged before they go.

    Args:
        judged: dotted config values of that judgement.
    """
    return lambda config: () if config.report.show_text else ("report.show_text", *judged)


def cost_of(stage: Stage, scene: CostScene) -> Cost:
    """What a stage will take."""
    if stage.cost is None:
        return Cost()
    count: Callable[[CostScene], Cost] = named(stage.cost) if isinstance(stage.cost, str) else stage.cost
    return count(scene)


class Catalogue(tuple[Stage, ...]):
    """Stages in the order in which they run.

    >>> Catalogue([Stage("a", 1, "", print), Stage("b", 1, "", print, optional=True)]).ordinary
    ('a',)
    """

    __slots__ = ()

    def __new__(cls, stages: Sequence[Stage]) -> Catalogue:
        """Stages in order.

        Raises:
            ValueError: a name stands twice, or a stage reads one that comes after it.
        """
        seen: set[str] = set()
        for stage in stages:
            if stage.name in seen or not seen.issuperset(stage.upstream):
                raise ValueError(f"stage {stage.name}: named twice, or it reads a stage that comes later")
            seen.add(stage.name)
        return super().__new__(cls, stages)

    @property
    def names(self) -> tuple[str, ...]:
        """All names in order."""
        return tuple(stage.name for stage in self)

    @property
    def ordinary(self) -> tuple[str, ...]:
        """Names of the stages that `arisk run` runs."""
        return tuple(stage.name for stage in self if not stage.optional)

    @property
    def optional(self) -> tuple[str, ...]:
        """Names of the stages that only their own verb runs."""
        return tuple(stage.name for stage in self if stage.optional)

    def explaining(self, config: Config) -> tuple[str, ...]:
        """Names of the ordinary stages that only say why."""
        return tuple(stage.name for stage in self if stage.explains is not None and stage.explains(config))

    def left_out(self, config: Config, rundir: RunDir) -> tuple[str, ...]:
        """Names of the stages that are not part of a run of this config."""
        aside = self.explaining(config)
        if config.why == "off":
            return aside
        settled = [(name, self.get(name).settled) for name in aside]
        return tuple(
            name for name, settle in settled if settle is not None and settle(config, rundir) is None
        )

    def before(self, name: str, config: Config) -> tuple[str, ...]:
        """Stages without which this one may not run: those it reads, and those it includes that decide."""
        stage, aside = self.get(name), {*self.optional, *self.explaining(config)}
        return (*stage.upstream, *(shown for shown in stage.shows if shown not in aside))

    def ordered(self, names: Sequence[str]) -> list[str]:
        """These names, each behind those of them that it reads or includes; else in the order of the stages.

        >>> Catalogue([Stage("a", 1, "", print, shows=("b",)), Stage("b", 1, "", print)]).ordered(["a", "b"])
        ['b', 'a']
        """
        placed: list[str] = []
        met: set[str] = set()

        def place(name: str) -> None:
            if name in met:
                return
            met.add(name)
            for earlier in (*self.get(name).upstream, *self.get(name).shows):
                place(earlier)
            placed.append(name)

        for name in self.names:
            place(name)
        return [name for name in placed if name in names]

    def after(self, names: Sequence[str]) -> set[str]:
        """All stages that read or include one of these, directly or through others."""
        found: set[str] = set()
        for name in self.ordered(self.names):
            stage = self.get(name)
            if {*names, *found}.intersection((*stage.upstream, *stage.shows)):
                found.add(name)
        return found

    def get(self, name: str) -> Stage:
        """A stage by name.

        Raises:
            ConfigError: there is none.
        """
        found = next((stage for stage in self if stage.name == name), None)
        if found is None:
            raise ConfigError(
                f"there is no stage {name!r}", where="stage", fix=f"name one of {', '.join(self.names)}"
            )
        return found
