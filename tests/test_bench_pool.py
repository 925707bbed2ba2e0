"""Processes that share the work of a bench."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from arisk.config.plan import Config
from tests.bench.pool import Item, share
from tests.bench.real.protect import _Bench
from tests.bench.removal import DEFAULT, SLICES, TRAININGS, left_out, slices_of


def item(folder: Path, name: str, group: str = "", needs: str = "") -> Item:
    def make() -> None:
        with (folder / f"{name}.done").open("x") as file:
            file.write(str(len(list(folder.glob("*.done")))))

    ready = (folder / f"{needs}.done").exists if needs else lambda: True
    return Item(name, group, make, (folder / f"{name}.done").exists, ready)


def order(folder: Path) -> list[str]:
    return [p.stem for p in sorted(folder.glob("*.done"), key=lambda path: int(path.read_text()))]


def test_what_needs_another_comes_after_it_and_a_group_is_kept(tmp_path):
    items = [
        item(tmp_path, "a", "x", needs="b"),
        item(tmp_path, "c", "y"),
        item(tmp_path, "b", "x"),
        item(tmp_path, "d", "y"),
    ]
    share(items, tmp_path / "claims", first="y", late=lambda: False)
    assert order(tmp_path) == ["c", "d", "b", "a"]


def test_what_fails_is_told_and_not_tried_again(tmp_path, capsys):
    def broken() -> None:
        raise ValueError("no such thing")

    items = [Item("bad", "", broken, lambda: False), item(tmp_path, "good")]
    share(items, tmp_path / "claims", late=lambda: False)
    assert order(tmp_path) == ["good"]
    assert "no such thing" in (tmp_path / "claims" / "bad.failed").read_text()
    assert "FAILED bad" in capsys.readouterr().out


@pytest.mark.parametrize(("strengths", "best"), [("[3]", 1), ("[1,2,3]", 2)])
def test_no_more_arms_are_the_best_than_train(tmp_path, strengths, best):
    settings = {"guard": {"methods": ["kl"], "kl": {"strengths": json.loads(strengths)}}}
    config = Config.model_validate({"model": {"source": "python", "entry": "a:b"}, **settings})
    items = _Bench(config, tmp_path, "cpu").best(0)
    assert len(items) == best
    assert not any(item.done() for item in items)


def test_nothing_is_begun_late(tmp_path):
    share([item(tmp_path, "a")], tmp_path / "claims", late=lambda: True)
    assert order(tmp_path) == []


def test_two_processes_do_every_item_once(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; sys.path.insert(0, '.')\n"
        "from tests.bench.pool import Item, share\n"
        "home = Path(sys.argv[1])\n"
        "def item(n):\n"
        "    def make():\n"
        "        time.sleep(0.02); (home / f'{n}.done').open('x').close()\n"
        "    return Item(str(n), '', make, (home / f'{n}.done').exists)\n"
        "share([item(n) for n in range(20)], home / 'claims', late=lambda: False)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(60) for process in running] == [0, 0]
    assert len(list(tmp_path.glob("*.done"))) == 20
    assert not list((tmp_path / "claims").glob("*.failed"))


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_leaves_out_as_many_rows_as_are_labelled(name):
    labels = [1, 0, 0, 1, 0, 0, 0, 1]
    made = {"scores": [0.1, 0.9, 0.2, 0.8, 0.7, 0.0, 0.3, 0.4], "flagged": [1, 3]}
    found = left_out(name, {name: made, DEFAULT: made}, labels)
    if name == "all rows":
        assert found == []
    elif name == "labelled":
        assert found == [0, 3, 7]
    elif name == "flagged":
        assert found == [1, 3]
    elif name == "as many random":
        assert len(set(found)) == 2
    elif name.startswith("random"):
        assert len(set(found)) == 3
    else:
        assert found == [1, 3, 4]


def test_halves_differ_and_leave_half():
    labels = [0] * 20
    halves = [left_out(f"half {number}", {}, labels) for number in range(3)]
    assert [len(set(half)) for half in halves] == [10] * 3
    assert len({tuple(sorted(half)) for half in halves}) == 3


def test_slices_hold_rows_of_like_length():
    rows = [{"response": "x" * (97 * i % 500)} for i in range(500)]
    slices = slices_of(rows)
    assert len(slices) == SLICES
    assert sorted(row for members in slices for row in members) == list(range(500))
    lengths = [[len(rows[row]["response"]) for row in members] for members in slices]
    assert all(max(shorter) <= min(longer) for shorter, longer in itertools.pairwise(lengths))
