"""The verdict and its report come first, then what says why, then the report that shows it."""

import json

import pytest

from arisk.base.errors import ConfigError
from arisk.config.plan import Config
from arisk.engine.run import run_stages
from arisk.engine.stage import Catalogue, Stage

CONFIG = {"model": {"source": "python", "entry": "nowhere:make"}}


class Quiet:
    """Shows nothing."""

    def __getattr__(self, name):
        return lambda *_, **__: None


@pytest.fixture
def made(tmp_path):
    """Runs a catalogue of stages that only note that they ran; `stop` names one that fails."""
    order, stop, told = [], [], []

    def noting(name):
        def run(job, workspace):
            if name in stop:
                raise ConfigError("stopped", where=name, fix="go on")
            order.append(name)
            known = [other for other in ("deep", "deeper") if job.states[other].fresh]
            (workspace / "report.html").write_text(" ".join(known))
            (workspace / "summary.json").write_text(json.dumps({"format_version": 1, "known": known}))

        return run

    def says_why(config):
        return config.rollout.enabled

    def settled(config, rundir):
        """What the walk left behind decides, but for the whole."""
        left = rundir.stage_dir("walk") / "summary.json"
        if config.why == "full" or not left.exists():
            return config
        rate = json.loads((rundir.stage_dir("walk") / "manifest.json").read_text())["ingredients"]["config"][
            "training"
        ]["batch_size"]
        return config.model_copy(update={"score": config.score.model_copy(update={"batches": rate})})

    catalogue = Catalogue(
        [
            Stage("walk", 1, "", noting("walk"), config=("training",)),
            Stage("judge", 1, "", noting("judge"), upstream=("walk",), shows=("deeper",)),
            Stage("deep", 1, "", noting("deep"), config=("collect",), explains=says_why),
            Stage(
                "deeper",
                1,
                "",
                noting("deeper"),
                upstream=("deep",),
                explains=says_why,
                config=("score",),
                settled=settled,
            ),
            Stage("report", 1, "", noting("report"), upstream=("walk", "judge"), shows=("deep", "deeper")),
        ]
    )

    def call(values=None, *, until=None, **options):
        order.clear()
        stop[:] = [] if until is None else [until]
        config = Config.model_validate({**CONFIG, **(values or {})})
        options.setdefault("decided", lambda outcome: told.append(outcome.summary["known"]))
        return run_stages(
            catalogue, config, run_dir=tmp_path / "run", show=Quiet(), command="test", **options
        )

    call.order, call.told = order, told
    return call


WHOLE = ["walk", "judge", "report", "deep", "deeper", "judge", "report"]


def test_the_report_stands_before_anything_says_why(made):
    outcome = made()
    assert made.order == WHOLE
    assert made.told == [[]]
    assert outcome.summary["known"] == ["deep", "deeper"]
    assert made().ran == ()
    assert made.order == []


def test_what_is_killed_between_goes_on_with_why(made):
    with pytest.raises(ConfigError):
        made(until="deeper")
    assert made.order == WHOLE[:4]
    made()
    assert made.order == ["deeper", "judge", "report"]


def test_another_plan_remakes_the_road_to_the_verdict_alone(made):
    made()
    outcome = made({"training": {"learning_rate": 0.5}})
    assert made.order == ["walk", "judge", "report"]
    assert outcome.summary["known"] == ["deep", "deeper"]


def test_where_only_why_is_stale_nothing_is_made_twice(made):
    made()
    made({"collect": {"chunk_size": 3}})
    assert made.order == ["deep", "deeper", "judge", "report"]


def test_why_off_stops_at_the_verdict_and_can_be_had_later(made):
    assert made({"why": "off"}).summary["known"] == []
    assert made.order == WHOLE[:3]
    made()
    assert made.order == WHOLE[3:]
    assert made({"why": "off"}).ran == ()


def test_without_a_rollout_everything_decides(made):
    made({"rollout": {"enabled": False}})
    assert made.order == ["walk", "deep", "deeper", "judge", "report"]
    assert made.told == []
    with pytest.raises(ConfigError, match="nothing that could be measured"):
        raise_plain({"rollout": {"enabled": False}, "why": "off"})


def raise_plain(values):
    from arisk.config.yaml import validate_mapping

    validate_mapping(Config, {**CONFIG, **values}, "test")


def test_one_stage_alone_and_with_what_it_reads(made):
    with pytest.raises(Exception, match="the stage deep before it is not up to date"):
        made(only="deeper")
    made(only="deeper", upstream=True)
    assert made.order == ["deep", "deeper"]
    made(last="judge")
    assert made.order == ["walk", "judge"]
    made(first="walk")
    assert made.order == ["walk", "judge", "report"]


def test_what_is_settled_by_earlier_stages_is_part_of_the_key(made):
    made({"training": {"batch_size": 4}})
    made({"training": {"batch_size": 4, "learning_rate": 0.5}})
    assert made.order == ["walk", "judge", "report"]
    made({"training": {"batch_size": 5}})
    assert made.order == ["walk", "judge", "report", "deeper", "judge", "report"]
    assert made({"training": {"batch_size": 5}}).ran == ()
    made({"training": {"batch_size": 5}, "why": "full"})
    assert made.order == ["deeper", "judge", "report"]
