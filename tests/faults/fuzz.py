"""The campaign: bad inputs and kills at random, each in its own process, judged by what may never happen.

::

    python -m tests.faults.fuzz 30                  # minutes; `just fuzz 30`
    python -m tests.faults.fuzz --tries 5           # of each class
    python -m tests.faults.fuzz --replay FILE       # one failure again

Never: a traceback, the net in `main()`, a hang, an exit code that is not documented, an error without what,
where and fix, lines of other libraries before ours, commands for a terminal, a change to a file outside the
run directory, a committed stage lost or changed, a damaged run that ends well with other numbers, a verdict
that rests on NaN. A killed run goes on and ends, byte for byte, like one that was not.

Every failure is kept as a small JSON file with its class and seed. The parent imports all there is to import
and forks one child for each command, so that a case costs what its command costs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.readers
import json
import math
import os
import pkgutil
import random
import re
import resource
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES=""
)

import torch
import yaml

from arisk.cli import main as arisk_main
from arisk.config.yaml import known_keys
from arisk.engine.rundir import RunDir
from tests.faults import harm
from tests.faults.harm import CLASSES, STAGES, Case, Place

ROOT = Path(__file__).parent.parent.parent
#: Exit codes that the documentation names (1 is a bug).
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 10, 11, 130, 143}
#: Those of errors, which say what, where and how to fix it.
ERRORS = {2, 3, 4, 5, 6, 7}
#: Seconds of processor and of the clock, and bytes on top of the imports, that one command may take.
CPU_LIMIT, WALL_LIMIT, MEMORY_LIMIT = 60, 400, 4 << 30
#: What a terminal obeys, our own colours apart (they are not set in a pipe).
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
#: The longest an error may be, in characters.
LONGEST = 6000
KILLS = "kills"
TWO = "two runs at once"
PLAN: dict[str, Any] = {
    "why": "full",
    "run": {"threads": 1, "dir": "run"},
    "model": {"path": "model", "adapter": {"r": 2}},
    "safety": {"path": "data/safety.jsonl"},
    "finetune": {"path": "data/finetune.jsonl"},
    "control": {"path": "data/control.jsonl"},
    "probes": {"small talk": {"path": "data/control.jsonl", "measure": "opening"}},
    "training": {"max_steps": 4, "batch_size": 2},
    "behaviour": {"prompts": 2, "ordinary_prompts": 1, "tokens": 3},
    "rollout": {"pilot_steps": 2, "segments": 1, "batches_per_segment": 2},
    "subspace": {"heldout_splits": 2},
    "forecast": {"bootstrap_samples": 20},
    "score": {"batches": 2, "hvp_batches": 1, "krylov_dim": 2, "nulls": 4, "examples": 2, "probe_points": 2},
    "verify": {"control_samples": 2},
    "guard": {
        "methods": ["plain", "replay", "projection", "kl", "average"],
        "calibration_steps": 1,
        "generate": 1,
        "max_new_tokens": 2,
        "task_samples": 2,
        "control_samples": 2,
    },
    "screen": {"max_steps": 4, "batches": 2, "batch_size": 2, "control_samples": 2, "examples": 1},
}
#: Commands that are killed: where they start, what they are, and what they make.
PROGRAMS: tuple[tuple[str, bool, list[str]], ...] = (
    ("run", False, ["run", "plan.yaml"]),
    ("run again", True, ["run", "plan.yaml", "--set", "training.learning_rate=5e-4"]),
    ("verify", True, ["verify", "plan.yaml"]),
    ("screen", True, ["screen", "plan.yaml"]),
    ("screen by path", True, ["screen", "plan.yaml", "--set", "screen.score=path"]),
    ("guard", True, ["guard", "plan.yaml"]),
)


@dataclass(frozen=True)
class Ending:
    """How a command ended: exit code (negative: the signal), and what it wrote."""

    code: int
    out: str
    err: str
    late: bool = False


def command(
    args: list[str],
    folder: Path,
    *,
    environment: dict[str, str | None] | None = None,
    setup: Callable[[], None] | None = None,
) -> Ending:
    """Run `arisk` with these arguments in a child of this process, in that folder."""
    return _ended(*_started(args, folder, environment or {}, setup))


def _started(
    args: list[str], folder: Path, environment: dict[str, str | None], setup: Callable[[], None] | None
) -> tuple[int, tuple[int, int]]:
    """The child, and the ends of its stdout and stderr to read from."""
    pipes = os.pipe(), os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            os.chdir(folder)
            for number, (reading, writing) in zip((1, 2), pipes, strict=True):
                os.dup2(writing, number)
                os.close(reading)
                os.close(writing)
            code = _child(args, folder, environment, setup)
        except Exception:  # noqa: BLE001 - of the campaign itself: shown, as a fork has no other way
            traceback.print_exc()
        finally:
            os._exit(code)
    for _, writing in pipes:
        os.close(writing)
    return child, (pipes[0][0], pipes[1][0])


def _child(
    args: list[str], folder: Path, environment: dict[str, str | None], setup: Callable[[], None] | None
) -> int:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = open(1, "w", encoding="utf-8", errors="strict", buffering=1, closefd=False)  # noqa: SIM115 - a handle
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115 - same
    os.environ["TMPDIR"] = str(folder / "tmp")
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * resource.getpagesize() + MEMORY_LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    if setup is not None:
        setup()
    sys.argv = ["arisk", *args]
    try:
        arisk_main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001 - what gets past the net is the failure looked for
        traceback.print_exc()
        code = 98
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


def _ended(child: int, streams: tuple[int, int]) -> Ending:
    """Read what the child writes until it ends, for no longer than it may take."""
    late, deadline = False, time.monotonic() + WALL_LIMIT
    texts = dict.fromkeys(streams, b"")
    pid = os.pidfd_open(child)
    waiting = {pid, *streams}
    while pid in waiting:
        ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            late = True
            os.killpg(child, signal.SIGKILL)
        for stream in ready:
            part = os.read(stream, 1 << 20) if stream != pid else b""
            if part:
                texts[stream] += part
            else:
                waiting.discard(stream)
    for stream in streams:  # what is left in the pipe; grandchildren may hold its other end
        os.set_blocking(stream, False)
        with contextlib.suppress(BlockingIOError):
            while part := os.read(stream, 1 << 20):
                texts[stream] += part
        os.close(stream)
    os.close(pid)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    out, err = (texts[stream].decode("utf-8", "surrogateescape") for stream in streams)
    return Ending(code, out, err, late or code == -signal.SIGXCPU)


def made_base(folder: Path) -> None:
    """A sound place: a tiny model, an adapter, three data sets, a plan and its finished run."""
    place = Place(folder)
    (folder / "outside").mkdir(parents=True)
    (folder / "tmp").mkdir()
    (folder / "data").mkdir()
    (folder / "outside" / "precious").write_text("not of arisk\n")
    for name, source, count in (
        ("safety", "safety", 6),
        ("finetune", "risky", 10),
        ("control", "control", 4),
    ):
        lines = (ROOT / "fixtures" / "data" / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    place.plan.write_text(yaml.safe_dump(PLAN), encoding="utf-8")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _save_models(folder)
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the tiny model of the campaign cannot be made")
    done = command(["run", "plan.yaml"], folder)
    if done.code:
        raise RuntimeError(f"the sound plan ends with {done.code}: {done.err}")


def _save_models(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from arisk.config.plan import AdapterConfig
    from arisk.models.selection import attach_adapter

    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    tokens = {"vocab_size": 430, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama = AutoConfig.for_model("llama", **shape, **tokens, max_position_embeddings=256)
    model = AutoModelForCausalLM.from_config(llama)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(ROOT / "fixtures" / "tiny-aligned").save_pretrained(folder / "model")
    attach_adapter(model, AdapterConfig(r=2), seed=0).save_pretrained(folder / "adapter")


@dataclass
class Campaign:
    """The sound place, how its commands end undisturbed, and what was tried and found.

    Attributes:
        base: a copy of the sound place.
        folder: where it lay when it was made, and where each case lies.
        keep: where failures are kept.
        tries, failures: numbers by class; kinds: numbers by what went wrong.
        kills: processes that a signal ended, by the stage they were at work on and by the signal.
    """

    base: Path
    folder: Path
    keep: Path
    tries: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    ends: dict[str, tuple[dict[str, str], int]] = field(default_factory=dict)

    def _laid_out(self, *, with_run: bool) -> None:
        """The case's folder, as sound as the base; always at the same path, which artifacts name."""
        shutil.copytree(self.base, self.folder, ignore=None if with_run else _no_run)

    def one(self, name: str, seed: int) -> list[str]:
        """Carry out one case; returns what went wrong."""
        self._laid_out(with_run=name in WITH_RUN)
        try:
            faults, told = self._carried_out(name, random.Random(f"{name} {seed}"), Place(self.folder))
        finally:
            _freed(self.folder)
        self.tries[name] += 1
        if faults:
            self.failures[name] += 1
            self.kinds.update(fault.partition(":")[0] for fault in faults)
            self.keep.mkdir(parents=True, exist_ok=True)
            file = self.keep / f"{re.sub('[^a-z]+', '-', name.lower())}-{seed}.json"
            file.write_text(json.dumps({"class": name, "seed": seed, "faults": faults, **told}, indent=1))
            _tell(f"{name} {seed}: {'; '.join(faults)[:300]}")
        return faults

    def _carried_out(self, name: str, rng: random.Random, place: Place) -> tuple[list[str], dict[str, Any]]:
        if name == KILLS:
            return self._killed(rng, place)
        if name == TWO:
            return self._two(rng, place)
        case = CLASSES[name](rng, place)
        before = _digests(place.folder, (*case.writes, "run"))
        stages = {} if case.harmed else _stages(place.run)
        done = command(case.args, place.folder, environment=case.environment, setup=case.setup)
        faults = judged(done, case, place)
        after = _digests(place.folder, (*case.writes, "run"))
        faults += [
            f"outside changed: {path}"
            for path in sorted(before.keys() | after)
            if before.get(path) != after.get(path)
        ]
        faults += _lost(stages, place.run)
        same = case.args[:2] == ["run", "plan.yaml"] and "--why" not in case.args
        if name == "artifacts" and done.code == 0 and same:
            new = place.folder / "new" if "new" in case.args else place.run
            faults += _differing(
                self._undisturbed("run")[0], _tree(new), "damage changed the result in silence"
            )
        told = {"args": case.args, "environment": case.environment, "harm": case.told, "code": done.code}
        return faults, {**told, "out": done.out[-2000:], "err": done.err[-4000:], "bug": _bugs(place)}

    def _undisturbed(self, program: str) -> tuple[dict[str, str], int]:
        """The files that a program leaves where nothing happens, and how many events of files it has."""
        if program not in self.ends:
            started, args = next((started, args) for key, started, args in PROGRAMS if key == program)
            aside = self.folder.with_name("aside")
            if self.folder.exists():
                self.folder.rename(aside)
            self._laid_out(with_run=started)
            count = self.folder.with_name("count")
            count.unlink(missing_ok=True)
            done = command(args, self.folder, setup=lambda: _counting(count))
            if done.code:
                raise RuntimeError(f"arisk {args} ends with {done.code}: {done.err}")
            self.ends[program] = _tree(self.folder / "run"), len(count.read_bytes())
            _freed(self.folder)
            if aside.exists():
                aside.rename(self.folder)
        return self.ends[program]

    def _killed(self, rng: random.Random, place: Place) -> tuple[list[str], dict[str, Any]]:
        program, started, args = rng.choice(
            (PROGRAMS[0], PROGRAMS[0], PROGRAMS[1], PROGRAMS[1], *PROGRAMS[2:])
        )
        wanted, events = self._undisturbed(program)
        if not started:
            shutil.rmtree(place.run)
        faults, told = [], []
        for _ in range(rng.choice((1, 1, 2, 3))):
            before = _stages(place.run)
            number = rng.choice(
                (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
            )
            if rng.random() < 0.75:
                at = rng.randrange(events)
                done = command(args, place.folder, setup=lambda at=at, number=number: _killing(at, number))
                told.append(f"{number.name} at event {at} of {events}")
            else:
                seconds = rng.random() * 2
                done = command(args, place.folder, setup=lambda s=seconds, n=number: _timed(s, n))
                told.append(f"{number.name} after {seconds:.3f} s of work")
            if done.code in (-number, 128 + number):
                self.kills[_at_work(place.run), number.name] += 1
            if done.code == -number and number != signal.SIGKILL:
                faults.append(f"signal: {number.name} was not handled")
            faults += [fault for fault in judged(done, Case(args), place) if number != signal.SIGKILL]
            faults += _lost(before, place.run, replaced=_stages_of(wanted))
        done = command(args, place.folder)
        faults += judged(done, Case(args), place)
        if done.code:
            faults.append(f"resume: it ends with {done.code}")
        else:
            faults += _differing(wanted, _tree(place.run), "resume differs")
        left = [path.name for path in place.run.iterdir() if path.name.startswith((".partial", ".trash"))]
        faults += [f"resume: {name} is left" for name in left]
        return faults, {
            "args": args,
            "harm": told,
            "code": done.code,
            "err": done.err[-4000:],
            "bug": _bugs(place),
        }

    def _two(self, rng: random.Random, place: Place) -> tuple[list[str], dict[str, Any]]:
        """Two writers in one run directory: one of them is told, and nothing of either is lost."""
        wanted, _ = self._undisturbed("run")
        if rng.random() < 0.5:
            shutil.rmtree(place.run)
        first, second = (_started(["run", "plan.yaml", "--force"], place.folder, {}, None) for _ in range(2))
        if rng.random() < 0.3:
            time.sleep(rng.random())
            (place.run / ".lock").unlink(missing_ok=True)
        ends = [_ended(*first), _ended(*second)]
        faults = [fault for end in ends for fault in judged(end, Case(["run"]), place)]
        if all(end.code for end in ends) and not any(end.code == 4 for end in ends):
            faults.append(f"two: both fail ({ends[0].code}, {ends[1].code})")
        done = command(["run", "plan.yaml"], place.folder)
        faults += judged(done, Case(["run"]), place)
        if done.code == 0:
            faults += _differing(wanted, _tree(place.run), "two writers")
        told = {"args": ["run"], "code": [end.code for end in ends], "harm": "two"}
        return faults, {**told, "err": "\n".join(end.err for end in ends)[-4000:], "bug": _bugs(place)}


#: Classes whose cases need the finished run.
WITH_RUN = ("artifacts", "folders and rights", "arguments", "environment", KILLS, TWO)


def _no_run(folder: str, names: list[str]) -> list[str]:
    return ["run"] if "run" in names and Path(folder).name == "base" else []


def _freed(folder: Path) -> None:
    """Remove a case, whatever rights it was given."""
    for at, folders, _ in os.walk(folder):
        for name in folders:
            path = Path(at) / name
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


def _events(work: Callable[[int], None]) -> None:
    """Call `work` with the number of each file event of this process that could leave something half done."""
    state = {"count": 0, "inside": False}
    names = {
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "shutil.rmtree",
    }

    def seen() -> None:
        if not state["inside"]:
            state["inside"] = True
            work(state["count"])
            state["count"] += 1
            state["inside"] = False

    def hook(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if event in names or writes:
            seen()

    flush = os.fsync

    def fsync(handle: int) -> None:
        seen()
        flush(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def _counting(file: Path) -> None:
    handle = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
    _events(lambda _: os.write(handle, b"x") and None)


def _killing(at: int, number: int) -> None:
    _events(lambda count: os.kill(os.getpid(), number) if count == at else None)


def _timed(seconds: float, number: int) -> None:
    """The signal after this much processor time, whatever the machine does beside."""
    if number == signal.SIGKILL:
        signal.signal(signal.SIGVTALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    else:
        signal.signal(signal.SIGVTALRM, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_VIRTUAL, max(seconds, 1e-3))


def judged(done: Ending, case: Case, place: Place) -> list[str]:
    """What is wrong with how a command ended; the kind stands before the colon."""
    text = done.out + done.err
    faults = _broken(done, text, _bugs(place))
    if found := OBEYED.search(text.replace("\r\n", "\n")):
        faults.append(f"terminal: {found.group()!r} reaches it")
    if done.code in ERRORS and case.args:  # `arisk` alone shows its help
        faults += _badly_told(done.err, first=case.args[:1] == ["check"])
    elif done.code == 0 and case.args[:1] == ["check"] and done.err:
        faults.append(f"foreign line: {done.err[:200]}")
    return faults + _verdicts(place)


def _broken(done: Ending, text: str, bugs: str) -> list[str]:
    """Ends that may never be: bugs, tracebacks, hangs, signals, other exit codes."""
    if bugs or "bug of arisk" in text:
        return [f"bug: {_last_line(bugs or text)}"]
    if "Traceback (most recent call last)" in text:
        return [f"traceback: {_last_line(text)}"]
    if done.late:
        return ["hang: more than the time it may take"]
    if done.code < 0 and -done.code != signal.SIGKILL:
        return [f"signal: died of {signal.Signals(-done.code).name}"]
    if done.code >= 0 and done.code not in DOCUMENTED:
        return [f"exit code: {done.code}: {text[-200:]}"]
    return []


def _badly_told(err: str, *, first: bool) -> list[str]:
    """What is wrong with the words of an error; `first`: nothing but the error may be said."""
    faults: list[str] = []
    line = err.lstrip("\n").partition("\n")[0]
    if not all(part in err for part in ("error: ", "where: ", "fix:   ")):
        faults.append(f"error: without what, where and fix: {err[-200:]}")
    elif first and not line.startswith("error: "):
        faults.append(f"foreign line: {line[:200]}")
    longest = max(err.split("\n"), key=len)
    if len(longest) > LONGEST:
        faults.append(f"too long: {len(longest)} characters, {longest[:100]}")
    if re.search(r"error: [^\n]*: '\w+'\n|for details|above report", err):
        faults.append(f"unclear: {line[:200]}")
    return faults


def _last_line(text: str) -> str:
    """Type and words of an exception with the innermost of our own places."""
    places = re.findall(r'File "[^"]*/(arisk/[^"]+)", line (\d+)', text)
    lines = [line for line in text.strip().splitlines() if line]
    at = f" ({places[-1][0]}:{places[-1][1]})" if places else ""
    return (lines[-1][:200] if lines else "") + at


def _verdicts(place: Place) -> list[str]:
    """Levels that are shown and rest on numbers that are none."""
    faults: list[str] = []
    for name in ("run", "new"):
        file = place.folder / name / "report" / "summary.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            verdict = json.loads(file.read_text())["verdict"]
            numbers = [verdict[key] for key in ("probability",) if verdict["level"] != "inconclusive"]
            if any(number is None or not math.isfinite(number) for number in numbers):
                faults.append(f"NaN verdict: {verdict['level']} with {numbers}")
    return faults


def _bugs(place: Place) -> str:
    return "\n".join(
        file.read_text(encoding="utf-8", errors="replace")
        for file in (place.folder / "tmp").glob("arisk-bug-*.txt")
    )


def _digests(folder: Path, apart: tuple[str, ...]) -> dict[str, str]:
    """What lies in a folder, by path: kind, rights, and the digest or target; some names apart."""
    skipped = {str(name).removeprefix("./").strip("/") for name in apart if name} | {"tmp"}
    found: dict[str, str] = {}
    for path in _walk(folder):
        name = str(path.relative_to(folder))
        if any(name == part or name.startswith(f"{part}/") for part in skipped):
            continue
        mode = path.lstat().st_mode
        what = str(path.readlink()) if path.is_symlink() else _digest(path) if stat.S_ISREG(mode) else ""
        found[name] = f"{stat.filemode(mode)} {what}"
    return found


def _walk(folder: Path) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            yield path
            if path.is_dir() and not path.is_symlink():
                yield from _walk(path)


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as err:
        return str(err.errno)


#: Numbers in JSON that time measures, and no two runs share.
TIMED = re.compile(r"seconds$|^cost$|^title$|^report$|^identity$")
#: Files that say when, how long and by whom.
APART = ("manifest.json", "report.html", "summary.md", ".digests.json", ".lock", ".holder.json")


def _tree(run: Path) -> dict[str, str]:
    """Digests of what a run computed; times and costs apart."""
    found: dict[str, str] = {}
    for path in _walk(run):
        name = str(path.relative_to(run))
        if path.is_symlink() or not path.is_file() or path.name in APART or name.startswith(".partial"):
            continue  # What a forced run that was ended leaves serves the next forced one.
        digest = _digest(path)
        if path.suffix == ".json":
            with contextlib.suppress(OSError, ValueError):
                timeless = json.dumps(_untimed(json.loads(path.read_text(encoding="utf-8"))), sort_keys=True)
                digest = hashlib.sha256(timeless.encode()).hexdigest()
        found[name] = digest
    return found


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(inner) for key, inner in value.items() if not TIMED.search(key)}
    return [_untimed(inner) for inner in value] if isinstance(value, list) else value


def _differing(wanted: dict[str, str], found: dict[str, str], what: str) -> list[str]:
    names = sorted(name for name in wanted.keys() | found if wanted.get(name) != found.get(name))
    return [f"{what}: {', '.join(names[:5])}"] if names else []


def _stages(run: Path) -> dict[str, dict[str, str]]:
    """The committed stages that are whole, each with its files."""
    found: dict[str, dict[str, str]] = {}
    for stage in (*STAGES, "verify", "screen", "guard"):
        with contextlib.suppress(Exception):
            RunDir(run).verify(stage, deep=True)
            if (run / stage).exists():
                found[stage] = _tree(run / stage)
    return found


def _at_work(run: Path) -> str:
    """The stage whose unfinished work lies in a run directory."""
    with contextlib.suppress(OSError, StopIteration):
        return next((run / ".partial").iterdir()).name.partition("-")[0]
    return "between stages"


def _stages_of(tree: dict[str, str]) -> dict[str, dict[str, str]]:
    """A tree by stages."""
    stages: dict[str, dict[str, str]] = {}
    for name, digest in tree.items():
        stage, _, rest = name.partition("/")
        if rest:
            stages.setdefault(stage, {})[rest] = digest
    return stages


def _lost(
    before: dict[str, dict[str, str]], run: Path, replaced: dict[str, dict[str, str]] | None = None
) -> list[str]:
    """Stages that were whole and are neither there, nor set aside whole, nor replaced by the new one."""
    after = _stages(run)
    faults: list[str] = []
    for stage, files in before.items():
        aside = run / f".trash-{stage}"
        here = after.get(stage)
        if here == files or (here is None and aside.exists() and _tree(aside) == files):
            continue
        if here is not None and (replaced is None or here == replaced.get(stage) or stage == "report"):
            continue
        faults.append(f"lost: the stage {stage}")
    return faults


def _table(campaign: Campaign, seconds: float) -> str:
    width = max(map(len, campaign.tries))
    lines = [f"{'class':<{width}}   tries  failures"]
    lines += [
        f"{name:<{width}}  {count:>6}  {campaign.failures[name]:>8}" for name, count in campaign.tries.items()
    ]
    total = f"{'all':<{width}}  {campaign.tries.total():>6}  {campaign.failures.total():>8}"
    kinds = ", ".join(f"{kind}: {count}" for kind, count in campaign.kinds.most_common())
    found = f"{seconds / 60:.0f} minutes; {kinds or 'nothing found'}"
    return "\n".join([*lines, total, *_killed(campaign.kills), found])


def _killed(kills: Counter[tuple[str, str]]) -> list[str]:
    """How many processes a signal ended, in all and by the stage at work; empty where there were none."""
    if not kills:
        return []
    signals, stages = Counter[str](), Counter[str]()
    for (stage, name), count in kills.items():
        signals[name] += count
        stages[stage] += count

    def counts(found: Counter[str]) -> str:
        return ", ".join(f"{name} {count}" for name, count in found.most_common())

    return [f"{kills.total()} processes killed ({counts(signals)}), at work on: {counts(stages)}"]


def _tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _imports() -> None:
    """Load what commands load, once for all children; nothing here may start a thread."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    import arisk

    # All of it: a child that gave up its rights may not be able to read Python's own folder.
    for module in pkgutil.walk_packages(arisk.__path__, "arisk."):
        if module.name != "arisk.__main__":
            importlib.import_module(module.name)

    torch.set_num_threads(1)
    harm.KEYS[:] = known_keys()


def main() -> None:
    """Read the arguments, run the campaign, print tries and failures by class; exit 1 where there are any."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("minutes", type=float, nargs="?", default=30)
    parser.add_argument("--tries", type=int, help="cases of each class, in place of minutes")
    parser.add_argument("--only", action="append", help="a class; repeatable")
    parser.add_argument("--seed", type=int, help="first seed; default: by the clock")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="folder of failures")
    parser.add_argument("--replay", type=Path, help="a kept failure")
    given = parser.parse_args()
    _imports()
    names = given.only or [*CLASSES, KILLS, TWO]
    seed = given.seed if given.seed is not None else int(time.time()) % 10**6 * 1000
    _tell(f"first seed {seed}")
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="arisk-fuzz-"))
    work.chmod(0o755)  # some cases run as nobody
    try:
        campaign = Campaign(work / "base", work / "place", given.keep.resolve())
        made_base(campaign.folder)
        campaign.folder.rename(campaign.base)
        if given.replay:
            kept = json.loads(given.replay.read_text())
            faults = campaign.one(kept["class"], kept["seed"])
            _tell("\n".join(faults) or "nothing is wrong any more")
            sys.exit(bool(faults))
        rounds = 0
        while given.tries is None or rounds < given.tries:
            for name in names:
                if given.tries is None and time.monotonic() - started > given.minutes * 60:
                    break
                campaign.one(name, seed + rounds)
            else:
                rounds += 1
                continue
            break
    except KeyboardInterrupt:
        _tell("interrupted")
    finally:
        _freed(work)
    _tell(_table(campaign, time.monotonic() - started))
    sys.exit(bool(campaign.failures.total()))


if __name__ == "__main__":
    main()
