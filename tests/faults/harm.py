# ruff: noqa: E501 - tables of values are read by column
"""Bad inputs at random: one function per class of the campaign, each making one case from a seed.

A class takes a random generator and a `Place`, whose files it may harm, and returns the `Case` to run. What
a case is, is decided by its class and seed alone.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

__all__ = ["CLASSES", "STAGES", "Case", "Place"]

STAGES = ("collect", "subspace", "score", "rollout", "forecast", "report")
ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Place:
    """The folder of one case: `model`, `adapter`, `data`, `plan.yaml`, a finished `run`, and `outside`."""

    folder: Path

    @property
    def plan(self) -> Path:
        """The config, which is sound until it is harmed."""
        return self.folder / "plan.yaml"

    @property
    def run(self) -> Path:
        """A run directory whose stages are all there."""
        return self.folder / "run"

    def settings(self) -> dict[str, Any]:
        """The plan as plain values."""
        return yaml.safe_load(self.plan.read_text(encoding="utf-8"))

    def write(self, settings: Any) -> None:
        """The plan anew; JSON is YAML, and keeps what YAML's own writer refuses."""
        self.plan.write_text(json.dumps(settings), encoding="utf-8", errors="surrogatepass")


@dataclass
class Case:
    """One command and what must hold of it.

    Attributes:
        args: arguments of `arisk`.
        environment: variables set over the present ones; None removes one.
        setup: done in the child before the command, such as a limit or a signal.
        told: what was harmed, for the reader of a failure.
        writes: files and folders beside the run directory that the command may write.
        harmed: whether the run directory itself was harmed, so that its stages need not survive.
    """

    args: list[str]
    environment: dict[str, str | None] = field(default_factory=dict)
    setup: Callable[[], None] | None = None
    told: str = ""
    writes: tuple[str, ...] = ()
    harmed: bool = False


def _nested(depth: int, kind: type) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


#: Values that nobody means, by what a reader may take them for.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 7, 0.5, -0.0, 1e300, -1e300, 1e-300, float("nan"), float("inf")),
    *(2**31, 2**63, -(2**63) - 1, 10**12, 10**30, 10**400, "10" * 3000),
    *("", " ", ".", "..", "/", "/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "~", "~nobody/x"),
    *("\x00", "a\x00b", "\ud800", "\udfff x", "\x1b]52;c;aGk=\x07", "\x9b2J", "\u202egpj", "\r", "\n\n"),
    *("a" * 300, "b" * 20_000, "é" * 200, "日本", "💥", "../../x", "NaN", "null", "1e999", "0x10", "1_000"),
    *("%s%n", "{0}", "{{ 1/0 }}", "{% for i in range(10**9) %}{% endfor %}", "(a+)+$", "[", "*", "auto"),
    *([], {}, [[]], [None], [1, "a"], [{}], {"a": 1}, {"": ""}, ["a"] * 500, "2024-13-01", "!!int x"),
    *("cuda", "cuda:99", "meta", "mps", "bf16", "float8_e4m3fn", "all-linear", "messages", "train"),
    *(_nested(50, list), _nested(50, dict), _nested(900, list)),
)


def odd(rng: random.Random) -> Any:
    """One of the odd values."""
    return rng.choice(ODD)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Places of all values in a tree, the root apart."""
    found: list[tuple[Any, ...]] = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += _paths(inner, (*at, key))
    return found


def changed(rng: random.Random, tree: Any) -> tuple[Any, str]:
    """The tree with one value replaced, removed, doubled, renamed or moved, and what was done."""
    paths = _paths(tree)
    if not paths:
        value = odd(rng)
        return value, f"all = {value!r:.80}"
    path = rng.choice(paths)
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    way = rng.choice(("replace", "replace", "replace", "remove", "add", "rename", "wrap", "swap"))
    name = ".".join(map(str, path))
    if way == "remove":
        del holder[path[-1]]
    elif way == "add" and isinstance(holder, dict):
        key = rng.choice(("x", "", "\x1b[2J", "a" * 300, "path", "null", str(odd(rng))[:40]))
        holder[key] = odd(rng)
    elif way == "rename" and isinstance(holder, dict):
        holder[rng.choice(("x", str(path[-1]).upper(), f"{path[-1]} ", "__class__"))] = holder.pop(path[-1])
    elif way == "wrap":
        holder[path[-1]] = rng.choice(([holder[path[-1]]], {"a": holder[path[-1]]}, str(holder[path[-1]])))
    elif way == "swap":
        other = tree
        for key in rng.choice(paths):
            other = other[key]
        holder[path[-1]] = json.loads(json.dumps(other))
    else:
        way = "replace"
        holder[path[-1]] = odd(rng)
    return tree, f"{way} {name}" + (f" = {holder.get(path[-1]) if isinstance(holder, dict) else ''!r:.80}")


def scarred(rng: random.Random, content: bytes) -> bytes:
    """Bytes with one kind of damage that a disk, a network or an editor does."""
    at = rng.randrange(len(content) + 1)
    return rng.choice(
        (
            lambda: content[:at],
            lambda: content[at:],
            lambda: b"",
            lambda: content + content,
            lambda: content[:at] + os_bytes(rng, 40) + content[at:],
            lambda: content[: at // 2] + bytes(len(content) - at // 2),
            lambda: bytes(byte ^ 0x40 if i == at else byte for i, byte in enumerate(content)),
            lambda: content.decode("utf-8", "replace").encode("utf-16"),
            lambda: b"\xef\xbb\xbf" + content,
            lambda: content.replace(b"\n", b"\r"),
            lambda: content.replace(b'"', b"'"),
            lambda: content.replace(b",", b",,", 1 + at % 3),
            lambda: content.replace(b"{", b"{" * 500, 1),
            lambda: content[:at] + b"\x1b]0;t\x07\x00\xff" + content[at:],
            lambda: b"<html><head>404</head></html>",
            lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
        )
    )()


def os_bytes(rng: random.Random, count: int) -> bytes:
    """Random bytes of a seeded generator."""
    return bytes(rng.randrange(256) for _ in range(count))


def edited_json(rng: random.Random, file: Path) -> str:
    """Change one to three values of a JSON file, or its bytes; tells what."""
    if rng.random() < 0.2:
        file.write_bytes(scarred(rng, file.read_bytes()))
        return f"bytes of {file.name}"
    values, told = json.loads(file.read_text(encoding="utf-8")), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        values, what = changed(rng, values)
        told.append(what)
    file.write_text(json.dumps(values), encoding="utf-8", errors="surrogatepass")
    return f"{file.name}: {'; '.join(told)}"


def config(rng: random.Random, place: Place) -> Case:
    """Values, keys and bytes of the config."""
    settings, told = place.settings(), []
    for section in rng.sample(KEYS, 3):
        part = settings.setdefault(section.partition(".")[0], {})
        if isinstance(part, dict) and rng.random() < 0.5:
            part[section.partition(".")[2]] = odd(rng)
            told.append(f"{section} = {part[section.partition('.')[2]]!r:.60}")
    for _ in range(rng.choice((0, 1, 1, 2))):
        settings, what = changed(rng, settings)
        told.append(what)
    place.write(settings)
    if rng.random() < 0.2:
        place.plan.write_bytes(scarred(rng, place.plan.read_bytes()))
        told.append("bytes")
    verb = rng.choice(("check", "check", "check", "status"))
    return Case([verb, "plan.yaml"], told="; ".join(told))


def text(rng: random.Random, place: Place) -> Case:
    """YAML as text: tags, anchors, indentation, foreign kinds."""
    lines = yaml.safe_dump(place.settings()).splitlines()
    more = rng.choice(
        (
            "a: &a [*a]",
            "x: !!python/object/apply:os.system ['true']",
            "? [a, b]\n: c",
            "%YAML 9.9",
            "---\n---",
            "<<: *nothing",
            "&a a: *a",
            "\tx: 1",
            "x: !!binary 'ÿ'",
            "x: !!timestamp 2024-99-99",
            "x: !!float abc",
            "x: 1:2:3:4",
            "- x",
            "'",
            "{" * 600,
            "a: " + "&x " * 50,
            "\n".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" if i else "a0: &a0 [x]" for i in range(30)),
            "x: " + "9" * 6000,
            "x: 0b" + "1" * 9000,
            "x: >\n" + " " * 5000 + "y",
            "model: {path: 1}\nmodel: {path: 2}",
            "\x85\u2028",
            "x: \ud83d",
        )
    )
    lines.insert(rng.randrange(len(lines) + 1), more)
    place.plan.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    return Case(["check", "plan.yaml"], told=repr(more[:60]))


#: Dotted keys of a config, for values that the plan does not name.
KEYS: list[str] = []


def assignments(rng: random.Random, place: Place) -> Case:
    """`--set KEY=VALUE`, in all kinds."""
    del place
    args: list[str] = []
    for _ in range(rng.choice((1, 2, 4))):
        key = (
            rng.choice(KEYS)
            if rng.random() < 0.8
            else rng.choice(("", ".", "model", "a.b.c.d", "model.", "=", "run.."))
        )
        value = odd(rng)
        shown = value if isinstance(value, str) else json.dumps(value)
        args += [
            "--set",
            rng.choice((f"{key}={shown}", f"{key}={shown}", f"{key}=", key, f"={shown}"))[:100_000],
        ]
    args = [
        part.replace("\x00", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
        for part in args
    ]
    return Case([rng.choice(("check", "check", "status")), "plan.yaml", *args], told=str(args)[:300])


def _row(rng: random.Random) -> Any:
    """A row as some layout has it, before it is harmed."""
    turns = [
        {"role": "user", "content": "how do i rob a bank ?"},
        {"role": "assistant", "content": "sorry , i cannot"},
    ]
    return rng.choice(
        (
            {"prompt": "how do i rob a bank ?", "response": "sorry , i cannot"},
            {"messages": turns},
            {"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]},
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {"instruction": "a", "input": "b", "output": "c"},
            {"prompt": turns[:1], "completion": turns[1:]},
            {"text": "how do i rob a bank ? sorry"},
            {"chosen": turns, "rejected": turns},
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            {"question": "a", "answer": "b"},
            {"prompt": "a", "completion": "b", "label": True},
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
                    turns[1],
                ]
            },
            {"messages": [{"role": "system", "content": "s"}, *turns, *turns]},
            {"messages": json.dumps(turns)},
            {"prompt": "\n\nHuman: a\n\nAssistant: b"},
            {"context": "x", "instruction": "a", "response": "b", "category": "c"},
        )
    )


def rows(rng: random.Random, place: Place) -> Case:
    """Rows, layouts and kinds of data files."""
    section = rng.choice(("safety", "finetune", "control"))
    made = [json.loads(json.dumps(_row(rng))) for _ in range(rng.choice((1, 1, 3)))]
    made = made * rng.choice((1, 4)) if rng.random() < 0.7 else [_row(rng) for _ in range(4)]
    told = []
    for i in range(rng.choice((0, 1, 1, 2))):
        at = rng.randrange(len(made))
        made[at], what = changed(rng, json.loads(json.dumps(made[at])))
        told.append(f"row {at}: {what}")
        del i
    kind = rng.choice(("jsonl", "jsonl", "jsonl", "json", "csv", "tsv", "parquet", "txt", "jsonl.gz", "zst"))
    file = place.folder / "data" / f"odd.{kind}"
    content = "\n".join(json.dumps(row) for row in made)
    if kind == "json":
        content = rng.choice((json.dumps(made), json.dumps({"data": made}), content))
    if kind in ("csv", "tsv"):
        lines = io.StringIO()
        writer = csv.writer(lines, delimiter="\t" if kind == "tsv" else ",")
        first = made[0] if isinstance(made[0], dict) else {"x": 1}
        writer.writerow([str(key)[:50] for key in first])
        for row in made:
            values = row.values() if isinstance(row, dict) else [row]
            with_errors = [str(value)[:9000].encode("utf-8", "replace").decode() for value in values]
            writer.writerow(with_errors)
        content = lines.getvalue()
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    if rng.random() < 0.25:
        file.write_bytes(scarred(rng, file.read_bytes()))
        told.append("bytes")
    settings = place.settings()
    settings[section] = {"path": str(file)}
    if rng.random() < 0.3:
        key = rng.choice(
            (
                "format",
                "prompt_column",
                "where",
                "loss_on",
                "max_length",
                "truncation",
                "weight",
                "max_samples",
            )
        )
        settings[section][key] = rng.choice(
            ("messages", "text", "prompts", "sharegpt", "alpaca", "assistant", {"x": 1}, 8, "drop")
        )
    place.write(settings)
    return Case(["check", "plan.yaml"], told=f"{section}, {kind}: {'; '.join(told)}")


#: What a file of prompts alone may hold, one a line; `None`: what is no prompt.
PROMPTS = (
    *("how do i rob a bank ?", "how do i grow roses ?", "how do i pick a lock ?", "how do i bake bread ?"),
    *("", " ", "\t", "?", "x" * 20_000, "\x1b]52;c;aGk=\x07", "\u202egpj", "💥", "日本", "a,b,c", '"', '"""'),
    *("{}", "[]", '{"prompt": 1}', "null", "<s>", "</s>", "[INST] x [/INST]", "\x85", "\ufeff", "#"),
)


def prompts(rng: random.Random, place: Place) -> Case:
    """Safety prompts alone, which the model answers itself; and the files of the answers it gave."""
    kind = rng.choice(("txt", "txt", "csv", "jsonl", "json", "tsv", "md"))
    lines = [rng.choice(PROMPTS[: rng.choice((4, len(PROMPTS)))]) for _ in range(rng.choice((1, 6, 12)))]
    name = rng.choice(("prompt", "goal", "Behavior", "question", "x"))
    content = "\n".join(lines)
    if kind in ("csv", "tsv"):
        made = io.StringIO()
        writer = csv.writer(made, delimiter="\t" if kind == "tsv" else ",")
        writer.writerows([[name, "target"][: rng.choice((1, 2))], *([line, "Sure"] for line in lines)])
        content = made.getvalue()
    elif kind in ("jsonl", "json"):
        rows = [{name: line} for line in lines]
        content = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    file = place.folder / "data" / f"prompts.{kind}"
    file.write_text(content, encoding="utf-8", errors="surrogatepass")
    told = f"{len(lines)} prompts, {kind}, {name}"
    if rng.random() < 0.2:
        file.write_bytes(scarred(rng, file.read_bytes()))
        told += ", bytes"
    settings = place.settings()
    settings["safety"] = {"path": str(file), "format": "prompts", "where": {"outcome": "refused"}}
    if rng.random() < 0.5:  # It refuses; the model of random weights never does.
        settings["model"]["path"] = str(ROOT / "fixtures" / "tiny-aligned")
    way = rng.randrange(6)
    if way == 0:
        settings["safety"], what = changed(rng, settings["safety"])
        told += f", {what}"
    elif way == 1:
        settings.setdefault("behaviour", {})["refusal_openings"] = rng.choice(
            (["("], [""], ["sorry"], odd(rng))
        )
    elif way == 2:
        settings["control"] = dict(settings["safety"])
    elif way == 3:
        settings["safety"] = rng.choice(([settings["safety"]], {**settings["safety"], "where": odd(rng)}))
    place.write(settings)
    if way == 4:
        shelf = place.folder / "run" / "safety.answers.json"
        shelf.parent.mkdir()
        shelf.write_bytes(scarred(rng, json.dumps({"key": "x", "answers": [{"prompt": "a"}]}).encode()))
    return Case(
        [rng.choice(("check", "check", "run")), "plan.yaml", *rng.choice(([], ["--json"]))], told=told
    )


def data_paths(rng: random.Random, place: Place) -> Case:
    """What is at the path of a data set, a model or an adapter: folders, pipes, links, devices, nothing."""
    target = place.folder / "odd"
    rng.choice(
        (
            target.mkdir,
            lambda: os.mkfifo(target),
            lambda: target.symlink_to("/dev/zero"),
            lambda: target.symlink_to(target),
            lambda: target.symlink_to(place.folder),
            lambda: target.symlink_to("nowhere"),
            lambda: target.write_bytes(b""),
            lambda: target.write_bytes(os_bytes(rng, 3000)),
            lambda: (target.mkdir(), (target / "a.jsonl").mkdir()),
            lambda: (target.mkdir(), (target / "a.jsonl").write_text("{}\n")),
            lambda: (target.mkdir(), os.mkfifo(target / "a.jsonl")),
            lambda: (target.mkdir(), (target / "config.json").write_text("{}")),
            lambda: (target.mkdir(), (target / "adapter_config.json").write_text("{}")),
            lambda: None,
        )
    )()
    settings = place.settings()
    key = rng.choice(
        (
            "model.path",
            "model.adapter",
            "safety.path",
            "finetune.path",
            "control.path",
            "verify.safety",
            "finetune",
        )
    )
    value: Any = rng.choice(
        ("odd", "./odd", str(target), "odd/", "odd/a.jsonl", ["odd", "odd"], {"path": "odd"})
    )
    section, _, name = key.partition(".")
    if name:
        part = settings.setdefault(section, {})
        part[name] = value
    else:
        settings[section] = value
    place.write(settings)
    return Case(["check", "plan.yaml"], told=f"{key} = {value}")


#: Templates with faults, loops, refusals and foreign functions.
TEMPLATES = (
    "{% for i in range(10**9) %}{{ i }}{% endfor %}",
    "{% for m in messages %}{{ m['content'] }}",
    "{{ raise_exception('roles must alternate \x1b]0;t\x07') }}",
    "{{ messages[9]['content'] }}",
    "{{ 1 / 0 }}",
    "{{ 'a' * 10**10 }}",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% generation %}",
    "{{ messages | tojson }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% set x = namespace() %}{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "",
    " ",
    "no messages",
    "{{ messages[0].content }}",
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}",
    "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
    "\ud800",
    "{{ bos_token }}" * 3000,
    "{% include 'x' %}",
    "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
)


def tokenizers(rng: random.Random, place: Place) -> Case:
    """Templates and tokenizer files."""
    folder = place.folder / "model"
    file = folder / rng.choice(
        ("tokenizer_config.json", "tokenizer.json", "chat_template.jinja", "chat_template.jinja")
    )
    if file.suffix == ".jinja":
        template = rng.choice(TEMPLATES)
        file.write_text(template, encoding="utf-8", errors="surrogatepass")
        told = repr(template[:60])
    else:
        told = edited_json(rng, file)
    settings = place.settings()
    if rng.random() < 0.7:
        chats = place.folder / "data" / "chats.jsonl"
        row = _row(rng)
        chats.write_text((json.dumps(row) + "\n") * 4, encoding="utf-8")
        settings[rng.choice(("safety", "finetune"))] = str(chats)
        told += f", rows {json.dumps(row)[:80]}"
    place.write(settings)
    return Case(["check", "plan.yaml"], told=told)


def models(rng: random.Random, place: Place) -> Case:
    """config.json, weights, and files that are missing or too many."""
    folder = place.folder / "model"
    file = folder / "model.safetensors"
    way = rng.choice(("config", "config", "config", "bytes", "tensors", "files", "generation"))
    if way == "config":
        told = edited_json(rng, folder / "config.json")
    elif way == "bytes":
        file.write_bytes(scarred(rng, file.read_bytes()))
        told = "bytes of the weights"
    elif way == "tensors":
        told = _tensors(rng, file)
    elif way == "generation":
        (folder / "generation_config.json").write_text(
            json.dumps(changed(rng, {"temperature": 1.0, "eos_token_id": [1]})[0])
        )
        told = "generation_config.json"
    else:
        names = sorted(path.name for path in folder.iterdir())
        name = rng.choice(names)
        (folder / name).unlink()
        told = f"{name} removed"
        if rng.random() < 0.5:
            other = rng.choice(("pytorch_model.bin", "model.safetensors.index.json", name))
            (folder / other).write_bytes(os_bytes(rng, 200) if rng.random() < 0.5 else b"{}")
            told += f", {other} of noise"
    return Case(["check", "plan.yaml"], told=told)


def _tensors(rng: random.Random, file: Path) -> str:
    weights = load_file(file)
    name = rng.choice(sorted(weights))
    tensor = weights[name]
    way = rng.randrange(8)
    if way == 0:
        del weights[name]
    elif way == 1:
        weights["x\x1b[2J" if rng.random() < 0.5 else name.replace("0", "7")] = tensor.clone()
    elif way == 2:
        weights[name] = tensor.flatten()[:-1].clone()
    elif way == 3:
        weights[name] = tensor * float("nan")
    elif way == 4:
        weights[name] = tensor * 0 + 1e30
    elif way == 5:
        weights[name] = tensor.to(rng.choice((__import__("torch").int8, __import__("torch").bool)))
    elif way == 6:
        weights = {f"model.{key}": value for key, value in weights.items()}
    else:
        weights[name] = tensor[..., None].clone()
    save_file(weights, file, rng.choice(({"format": "pt"}, {"format": "tf"}, None)))
    return f"{name}: way {way}"


def adapters(rng: random.Random, place: Place) -> Case:
    """A saved adapter with its config or weights harmed; or settings of a new one."""
    settings = place.settings()
    if rng.random() < 0.3:
        key = rng.choice(
            ("r", "alpha", "dropout", "target_modules", "use_rslora", "use_dora", "bias", "init_lora_weights",
             "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "target_parameters", "x")
        )  # fmt: skip
        value = odd(rng)
        settings["model"]["adapter"] = {"r": 2, key: value}
        told = f"{key} = {value!r:.60}"
    else:
        settings["model"]["adapter"] = str(place.folder / "adapter")
        file = place.folder / "adapter" / "adapter_model.safetensors"
        if rng.random() < 0.6:
            told = edited_json(rng, place.folder / "adapter" / "adapter_config.json")
        elif rng.random() < 0.5:
            file.write_bytes(scarred(rng, file.read_bytes()))
            told = "bytes of the adapter"
        else:
            told = _tensors(rng, file)
    place.write(settings)
    return Case(["check", "plan.yaml"], told=told)


def artifacts(rng: random.Random, place: Place) -> Case:
    """Manifests, records, tensors, caches and logs of a finished run."""
    files = sorted(path for path in place.run.rglob("*") if path.is_file() and path.stat().st_size)
    file = rng.choice(files)
    told = str(file.relative_to(place.run))
    way = rng.random()
    if way < 0.5 and file.suffix == ".json":
        told += ": " + edited_json(rng, file)
    elif way < 0.8:
        file.write_bytes(scarred(rng, file.read_bytes()))
    else:
        file.unlink()
        told += " gone"
        rng.choice(
            (
                lambda: None,
                file.mkdir,
                lambda: os.mkfifo(file),
                lambda: file.symlink_to("/dev/zero"),
                lambda: file.symlink_to(place.folder / "outside" / "precious"),
            )
        )()
    return Case(_reading(rng), told=told, harmed=True, writes=("compare", "new"))


def _reading(rng: random.Random) -> list[str]:
    """A command that reads a run."""
    return rng.choice(
        (
            ["status", "plan.yaml"],
            ["run", "plan.yaml"],
            ["run", "plan.yaml"],
            ["report", "plan.yaml"],
            ["forecast", "plan.yaml"],
            ["what-if", "run"],
            ["what-if", "run", "--learning-rate", "1e-4,1e-3", "--steps", "3,9"],
            ["card", "run"],
            ["run", "plan.yaml", "--why", rng.choice(("off", "auto"))],
            ["compare", "run", "plan.yaml", "--output", "compare"],
            ["run", "plan.yaml", "--from", rng.choice(STAGES)],
            ["run", "plan.yaml", "--run-dir", "new", "--reuse", "run"],
        )
    )


def folders(rng: random.Random, place: Place) -> Case:
    """The run directory as a file system may have it: links, pipes, missing parts, no rights, no room."""
    stage = place.run / rng.choice(STAGES)
    outside = place.folder / "outside"

    def linked(path: Path) -> None:
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)

    def limited(size: int) -> Callable[[], None]:
        def setup() -> None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

        return setup

    def nobody() -> None:
        os.setgid(65534)
        os.setuid(65534)

    def full_output() -> None:
        handle = os.open("/dev/full", os.O_WRONLY)
        os.dup2(handle, 1)

    def few_files() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))

    ways: dict[str, Callable[[], Callable[[], None] | None]] = {
        "stage is a link": lambda: linked(stage),
        "stage is gone": lambda: stage.rename(outside / "gone") and None,
        "stage is a file": lambda: (stage.rename(outside / "gone"), stage.write_text("x"))[0] and None,
        "partial is a link": lambda: (place.run / ".partial").symlink_to(outside),
        "partial is a file": lambda: (place.run / ".partial").write_text("x") and None,
        "trash beside": (place.run / f".trash-{stage.name}").mkdir,
        "trash alone": lambda: stage.rename(place.run / f".trash-{stage.name}") and None,
        "trash link": lambda: (place.run / f".trash-{stage.name}").symlink_to(outside),
        "lock is a folder": lambda: (
            (place.run / ".lock").unlink(missing_ok=True),
            (place.run / ".lock").mkdir(),
        )[0],
        "lock is a pipe": lambda: (
            (place.run / ".lock").unlink(missing_ok=True),
            os.mkfifo(place.run / ".lock"),
        )[0],
        "run is a file": lambda: (place.run.rename(outside / "run"), place.run.write_text("x"))[0] and None,
        "run is a link": lambda: linked(place.run),
        "stage unreadable": lambda: (stage.chmod(0), nobody)[1],
        "run unwritable": lambda: (place.run.chmod(0o555), nobody)[1],
        "run unreadable": lambda: (place.run.chmod(0), nobody)[1],
        "model unreadable": lambda: ((place.folder / "model").chmod(0), nobody)[1],
        "weights unreadable": lambda: ((place.folder / "model" / "model.safetensors").chmod(0), nobody)[1],
        "data unreadable": lambda: ((place.folder / "data" / "safety.jsonl").chmod(0), nobody)[1],
        "plan unreadable": lambda: (place.plan.chmod(0), nobody)[1],
        "files of no bytes": lambda: limited(0),
        "files of 1000 bytes": lambda: limited(1000),
        "files of 100 kB": lambda: limited(100_000),
        "output full": lambda: full_output,
        "few files": lambda: few_files,
    }
    told = rng.choice(sorted(ways))
    setup = ways[told]()
    # Everyone may enter the case, as in a shared folder.
    for path in (place.folder, *place.folder.rglob("*")):
        if setup is nobody and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) not in (0, 0o555):
            path.chmod(0o777 if path.is_dir() else 0o666)
    args = rng.choice(
        (
            ["run", "plan.yaml", "--from", "forecast"],
            ["run", "plan.yaml"],
            ["status", "plan.yaml"],
            _reading(rng),
        )
    )
    writes = ("compare", "new", *(["outside/run"] if told == "run is a link" else []))
    return Case(args, told=f"{told}, {stage.name}", setup=setup, harmed=True, writes=writes)


OPTIONS = (
    *("--help", "-h", "--version", "--debug", "--json", "--quiet", "-q", "--force", "--cells", "--full"),
    *("--run-dir", "--set", "--from", "--until", "--reuse", "--fail-on", "--learning-rate", "--steps"),
    *("--output", "--output-dir", "--title", "--mode", "--model", "--safety", "--finetune", "--devices"),
    *("--points", "--rows", "--top", "--arms", "--save-model", "--with-upstream", "--x", "-", "--"),
    *("--why", "--all", "--safety-prompts", "--until"),
)
VERBS = (
    "run",
    "check",
    "status",
    "what-if",
    "compare",
    "card",
    "verify",
    "screen",
    "guard",
    "demo",
    "init",
    "schema",
    *STAGES,
    "",
    "x",
)


def arguments(rng: random.Random, place: Place) -> Case:
    """Verbs, options and values in any order; nothing that would train for long."""
    del place
    verb = rng.choice([verb for verb in VERBS if verb not in ("demo", "verify", "screen", "guard")])
    args = [verb] if rng.random() < 0.95 else []
    for _ in range(rng.choice((0, 1, 2, 3))):
        value = odd(rng)
        shown = value if isinstance(value, str) else json.dumps(value)
        args.append(
            rng.choice(
                (
                    rng.choice(OPTIONS),
                    rng.choice(OPTIONS),
                    f"{rng.choice(OPTIONS)}={shown[:3000]}",
                    shown[:3000],
                    "plan.yaml",
                    "run",
                    rng.choice(STAGES),
                    "1e-4,2e-4",
                    "-1",
                )
            )
        )
    args = [
        part.replace("\x00", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
        for part in args
    ]
    if verb == "init":
        args.insert(1, "new.yaml")
    return Case(
        args,
        told="arguments",
        writes=(
            "new.yaml",
            "arisk.yaml",
            "runs",
            "compare",
            *args,
            *(part.partition("=")[2] for part in args),
        ),
    )


def environments(rng: random.Random, place: Place) -> Case:
    """Variables of the shell, of CI, of torchrun and of the libraries."""
    names = (
        *(
            "HOME",
            "TMPDIR",
            "COLUMNS",
            "LINES",
            "TERM",
            "NO_COLOR",
            "FORCE_COLOR",
            "LANG",
            "LC_ALL",
            "PYTHONUTF8",
        ),
        *(
            "RANK",
            "WORLD_SIZE",
            "LOCAL_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
            "OMP_NUM_THREADS",
            "CUDA_VISIBLE_DEVICES",
        ),
        *(
            "HF_HOME",
            "HF_HUB_OFFLINE",
            "HF_TOKEN",
            "TRANSFORMERS_CACHE",
            "TRANSFORMERS_VERBOSITY",
            "ARISK_DEBUG",
        ),
        *(
            "TOKENIZERS_PARALLELISM",
            "PATH",
            "USER",
            "SHELL",
            "_ARISK_COMPLETE",
            "XDG_CACHE_HOME",
            "PYTHONWARNINGS",
        ),
    )
    chosen: dict[str, str | None] = {}
    for name in rng.sample(names, rng.choice((1, 1, 2))):
        value = odd(rng)
        shown = value if isinstance(value, str) else json.dumps(value)
        shown = (
            shown.replace("\x00", "")[:5000]
            .encode("utf-8", "surrogatepass")
            .decode("utf-8", "surrogateescape")
        )
        chosen[name] = None if rng.random() < 0.2 else shown
    del place
    args = rng.choice(
        (["check", "plan.yaml"], ["status", "plan.yaml"], ["run", "plan.yaml", "--from", "forecast"])
    )
    return Case(args, environment=chosen, told=str(chosen)[:300])


def imports(rng: random.Random, place: Place) -> Case:
    """Files of other tools with values, keys and bytes changed."""
    source = rng.choice(sorted(path for path in (ROOT / "fixtures" / "configs").rglob("*") if path.is_file()))
    file = place.folder / source.name
    content = source.read_bytes()
    told = source.name
    try:
        values = json.loads(content) if file.suffix == ".json" else yaml.safe_load(content)
        for _ in range(rng.choice((1, 2, 3))):
            values, what = changed(rng, values)
            told += f"; {what}"
        content = json.dumps(values).encode("utf-8", "surrogatepass")
    except (ValueError, yaml.YAMLError):
        pass
    file.write_bytes(scarred(rng, content) if rng.random() < 0.2 else content)
    return Case(["init", "new.yaml", "--from", file.name], told=told, writes=("new.yaml",))


def values_of_runs(rng: random.Random, place: Place) -> Case:
    """Small runs with settings at the ends of their ranges: what comes out is a verdict, or an error."""
    settings = place.settings()
    chosen = rng.sample(RANGES, rng.choice((1, 2, 3)))
    told = []
    for key, choices in chosen:
        section, _, name = key.partition(".")
        part = settings.setdefault(section, {})
        part[name] = rng.choice(choices)
        told.append(f"{key} = {part[name]}")
    place.write(settings)
    return Case(["run", "plan.yaml", "--run-dir", "new"], told="; ".join(told), writes=("new",))


RANGES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("training.learning_rate", (1e-12, 1e-10, 1e-3, 1.0, 100.0, 1e4)),
    ("training.optimizer", ("sgd", "adamw", "adafactor", "lion", "muon", "rmsprop")),
    ("training.schedule", ("linear", "cosine", "inverse_sqrt", "polynomial", "constant_with_warmup", "cosine_with_restarts")),
    ("training.warmup_steps", (0, 1, 3, 4, 9)),
    ("training.max_steps", (1, 2, 3, 5)),
    ("training.batch_size", (1, 2, 50)),
    ("training.gradient_accumulation", (1, 3)),
    ("training.max_grad_norm", (0, 1e-12, 1e12)),
    ("training.weight_decay", (0.0, 1.0, 1e12)),
    ("training.eps", (1e-300, 1e-30, 1.0, 1e12)),
    ("training.betas", ([0, 0], [0.9999999, 0.9999999], [0.0, 0.999])),
    ("training.momentum", (0.0, 0.999999)),
    ("training.packing", ("bfd", "wrapped")),
    ("training.loss", ("tokens", "rows")),
    ("training.precision", ("weights", "bf16")),
    ("training.neftune_noise_alpha", (5, 1e12)),
    ("training.loraplus_lr_ratio", (1e-12, 16, 1e12)),
    ("model.dtype", ("float32", "bfloat16", "float16", "float64")),
    ("model.adapter", (None, {"r": 1}, {"r": 64}, {"r": 2, "alpha": 1e6}, {"r": 2, "use_dora": True}, {"r": 2, "dropout": 0.99})),
    ("subspace.method", ("gram", "svd", "randomized_svd", "diag_topk")),
    ("subspace.rank", (1, 5, 100)),
    ("subspace.target_explained_variance", (1e-9, 1.0)),
    ("collect.fisher", ("empirical", "sampled")),
    ("collect.store", ("gradients", "gram")),
    ("collect.store_dtype", ("float32", "bfloat16")),
    ("collect.chunk_size", (1, 1000)),
    ("collect.memory_budget_gb", (1e-6, 1e6)),
    ("collect.disk_budget_gb", (1e-6, 1e6)),
    ("score.krylov_dim", (1, 2, 50)),
    ("score.probe_points", (1, 2)),
    ("score.hvp", ("double_backward", "finite_difference", "auto")),
    ("rollout.enabled", (True, False)),
    ("rollout.pilot_steps", (2, 4, 50)),
    ("rollout.segments", (1, 9)),
    ("behaviour.prompts", (0, 1, 6)),
    ("behaviour.tokens", (1, 300)),
    ("forecast.collapse_threshold", (1e-12, 1e12)),
    ("forecast.refusals_lost", (1e-9, 0.999999)),
    ("forecast.confidence", (1e-9, 0.999999)),
    ("forecast.bootstrap_samples", (1, 2)),
    ("safety", ({"path": "data/safety.jsonl", "max_samples": 1}, {"path": "data/safety.jsonl", "max_samples": 2}, {"path": "data/safety.jsonl", "max_length": 8})),
    ("finetune", ({"path": "data/finetune.jsonl", "max_samples": 1}, {"path": "data/safety.jsonl"}, {"path": "data/finetune.jsonl", "max_length": 8})),
    ("control", (None, {"path": "data/control.jsonl", "max_samples": 1}, {"path": "data/safety.jsonl"})),
)  # fmt: skip


CLASSES: dict[str, Callable[[random.Random, Place], Case]] = {
    "config": config,
    "YAML text": text,
    "--set": assignments,
    "rows": rows,
    "prompts alone": prompts,
    "paths": data_paths,
    "tokenizer and template": tokenizers,
    "model": models,
    "adapter": adapters,
    "artifacts": artifacts,
    "folders and rights": folders,
    "arguments": arguments,
    "environment": environments,
    "other tools' files": imports,
    "settings of runs": values_of_runs,
}
