"""Work in a child under limits: what comes back, what stops it, and what is left behind."""

import os
import time

import pytest

from arisk.base.processes import LimitReachedError, bounded


def spin():
    while True:
        pass


def allocate():
    return len("a" * (1 << 36))


def test_the_answer_comes_back_whatever_its_size():
    big = {"text": "é\ud800" * 100_000, "numbers": [1, None, 2.5]}
    assert bounded(lambda: big, seconds=5) == big
    assert bounded(lambda: None, seconds=5) is None


def test_loops_end_in_seconds_and_leave_no_child():
    began = time.monotonic()
    with pytest.raises(LimitReachedError, match="does not end"):
        bounded(spin, seconds=1)
    assert time.monotonic() - began < 30
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_memory_is_limited():
    with pytest.raises(LimitReachedError, match="memory"):
        bounded(allocate, seconds=5, memory=1 << 28)


def test_faults_keep_their_words():
    def fail():
        return {}["missing"]

    with pytest.raises(RuntimeError, match="KeyError: 'missing'"):
        bounded(fail, seconds=5)
    with pytest.raises(RuntimeError, match="TypeError"):
        bounded(lambda: {1, 2}, seconds=5)


def test_the_child_changes_nothing_here():
    kept = []
    assert bounded(lambda: kept.append(1) or len(kept), seconds=5) == 1
    assert kept == []
