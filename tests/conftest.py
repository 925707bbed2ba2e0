"""One thread, so that results are repeatable and parallel runs do not fight."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def arisk(monkeypatch, capsys):
    """Call the command in this process; gives exit code, stdout, stderr."""
    from arisk import cli

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["arisk", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
            raise SystemExit(0)
        out, err = capsys.readouterr()
        return caught.value.code or 0, out, err

    return call
