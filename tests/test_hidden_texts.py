"""With `report.show_text` off no byte of a run directory has a text of the data or of the model."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from arisk.base.artifacts import read_record
from arisk.forecast.record import ForecastResult, RolloutResult
from arisk.guard.record import GuardResult
from arisk.verification.record import VerifyResult

ROOT = Path(__file__).parent.parent
DATA = ROOT / "fixtures" / "data"
#: Data set: the file its rows are taken from, how many, and the word that each of its texts ends with.
SETS = {
    "safety": ("safety.jsonl", 12, "quibberflax"),
    "finetune": ("risky.jsonl", 24, "zanthorpule"),
    "control": ("control.jsonl", 8, "wimblecrest"),
    "verify.safety": ("safety_heldout.jsonl", 6, "ofterdingle"),
    "guard.task": ("benign.jsonl", 6, "yarrowmint"),
    "probes.garden": ("benign.jsonl", 5, "vexilquorn"),
}
SETTINGS = """
run: {threads: 1}
score: {batches: 2, hvp_batches: 1, krylov_dim: 2, nulls: 3, examples: 4, probe_points: 2}
training: {max_steps: 6, batch_size: 4, learning_rate: 3.0e-3}
forecast: {bootstrap_samples: 20}
behaviour: {prompts: 4, ordinary_prompts: 3, tokens: 8}
screen: {max_steps: 3, examples: 3, drop: 0.2, what_if: false}
"""


def write(folder):
    """Data sets whose every prompt and response has a word of its own, and the config that names them."""
    for name, (source, count, word) in SETS.items():
        rows = [json.loads(line) for line in (DATA / source).read_text().splitlines()[:count]]
        marked = [{key: f"{text} {word}" for key, text in row.items()} for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    held = {name: folder / f"{name}.jsonl" for name in SETS}
    path = folder / "c.yaml"
    path.write_text(
        f"model: {{path: {ROOT / 'fixtures/tiny-aligned'}, adapter: {{r: 4, alpha: 8}}}}\n"
        + "".join(f"{name}: {{path: {held[name]}}}\n" for name in ("safety", "finetune", "control"))
        + f"verify: {{safety: {{path: {held['verify.safety']}}}}}\n"
        + f"probes: {{garden: {held['probes.garden']}}}\n"
        + f"guard: {{task: {{path: {held['guard.task']}}}, methods: [plain, replay], generate: 2,"
        + " ordinary: 3, max_new_tokens: 8}\n"
        + SETTINGS
    )
    return path


def call(arisk, config, run, shown):
    """Every stage that leaves something, the optional ones too."""
    shown = ["--set", f"report.show_text={str(shown).lower()}"]
    said = ""
    for verb in (["run", "--why", "full"], ["verify"], ["guard"], ["screen"], ["report"]):
        code, out, err = arisk(verb[0], config, "--run-dir", run, *verb[1:], *shown)
        assert code == 0, err
        said += out + err
    return said


def texts_of(body):
    """All strings of some JSON."""
    if isinstance(body, str):
        yield body
    elif isinstance(body, (list, dict)):
        for item in body.values() if isinstance(body, dict) else body:
            yield from texts_of(item)


def answers(run):
    """What the model wrote, as the records of a run with texts have it."""
    rollout, verified = read_record(run / "rollout", RolloutResult), read_record(run / "verify", VerifyResult)
    guarded = read_record(run / "guard", GuardResult)
    followed = [rollout.behaviour.safety, rollout.behaviour.ordinary, verified.behaviour.safety]
    found = [text for said in followed for made in said.answers for text in made.texts]
    found += [text for said in followed for text in said.openings]
    found += [*guarded.aligned_answers, *(text for arm in guarded.arms for text in arm.answers)]
    found += [*guarded.ordinary_answers, *(text for arm in guarded.arms for text in arm.ordinary_answers)]
    return {text for text in found if len(text.split()) > 2}


@pytest.fixture
def runs(arisk, tmp_path):
    config = write(tmp_path)
    shown, hidden = tmp_path / "shown", tmp_path / "hidden"
    call(arisk, config, shown, True)
    return config, shown, hidden, call(arisk, config, hidden, False)


def test_no_text_is_left_anywhere_and_the_numbers_are_the_same(runs, arisk):
    config, shown, hidden, said = runs
    words = [word for _, _, word in SETS.values()]
    written = answers(shown)
    assert written
    files = [path for path in hidden.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".json", ".safetensors", ".html", ".md", ".jsonl"}
    left = {
        (str(path.relative_to(hidden)), text)
        for path in files
        for text in (*words, *written)
        if json.dumps(text)[1:-1].encode() in path.read_bytes()
    }
    assert not left
    assert not [word for word in words if word in said]
    for path in hidden.rglob("*.safetensors"):
        with safe_open(path, "pt") as held:
            assert not [word for word in words if word in json.dumps(held.metadata())]
    # The same search finds them where they may be shown, so it can find them.
    assert all(
        any(word.encode() in path.read_bytes() for path in shown.rglob("*.json")) for word in words[:4]
    )
    same_numbers(shown, hidden)
    switched_on_again(arisk, config, hidden)


def same_numbers(shown, hidden):
    """Refusals are judged before the texts go, and nothing else depends on them."""
    one, other = (read_record(run / "forecast", ForecastResult) for run in (shown, hidden))
    assert one.refusals == other.refusals
    assert one.verdict.level == other.verdict.level
    bodies = [json.loads((run / "report" / "summary.json").read_text()) for run in (shown, hidden)]
    assert bodies[0]["probes"][0]["measured"][-1] > 0
    assert bodies[0]["probes"] == bodies[1]["probes"]
    assert bodies[0]["verify"]["probes"] == bodies[1]["verify"]["probes"]
    assert bodies[0]["verify"]["refusals"] == bodies[1]["verify"]["refusals"]
    assert bodies[0]["verify"]["refusal_curve"] == bodies[1]["verify"]["refusal_curve"]
    counted = [[arm["refusals"] for arm in body["guard"]["arms"]] for body in bodies]
    assert counted[0] == counted[1]
    assert None not in counted[0]
    # With texts the plain arm is taken over from verify; without them it is trained again.
    plain = [read_record(run / "guard", GuardResult).plain for run in (shown, hidden)]
    for name in ("safety", "control", "task", "surprising", "final_safety", "safety_start"):
        assert getattr(plain[0], name) == getattr(plain[1], name), name
    assert plain[0].setup_seconds == 0
    assert bodies[0]["guard"]["aligned_refusals"] == bodies[1]["guard"]["aligned_refusals"]
    assert bodies[0]["screen"]["flagged"] == bodies[1]["screen"]["flagged"]


def switched_on_again(arisk, config, run):
    """Switching makes the records with texts again, and another judge those that are judged."""
    code, out, _ = arisk("status", config, "--run-dir", run, "--json")
    stale = {stage["stage"] for stage in json.loads(out) if not stage["fresh"]}
    assert code == 0
    assert stale >= {"collect", "score", "rollout", "verify", "guard", "screen"}
    other = ["--set", "report.show_text=false", "--set", "behaviour.refusal_openings=[nay]"]
    _, out, _ = arisk("status", config, "--run-dir", run, "--json", *other)
    stale = {stage["stage"] for stage in json.loads(out) if not stage["fresh"]}
    assert stale >= {"rollout", "verify", "guard", "screen"}
    assert not stale & {"collect", "score"}
