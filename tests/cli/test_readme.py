"""Every command of the README runs as it stands there, on its config, with the embedded model behind it."""

import re
import shlex
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest

from arisk import cli

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "fixtures"
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [
    line for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL) for line in block.splitlines()
]
#: Commands of the shell blocks, then those inside sentences that stand alone.
COMMANDS = [line.partition("#")[0].strip() for line in BLOCKS if line.startswith("arisk ")]
INLINE = [found for found in re.findall(r"`(arisk [^`]+ --[^`]+)`", TEXT) if "…" not in found]
#: Files that the README names, with the fixture behind each and the rows that are enough here.
FILES = {
    "refusals.jsonl": ("safety.jsonl", 8),
    "train.jsonl": ("mixed.jsonl", 16),
    "ordinary.jsonl": ("control.jsonl", 4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a reader has: a model, rows, the config of a trainer."""
    made = tmp_path_factory.mktemp("readme")
    shutil.copytree(FIXTURES / "tiny-aligned", made / "model")
    shutil.copy(FIXTURES / "configs" / "axolotl-lora.yml", made / "axolotl.yml")
    for name, (source, count) in FILES.items():
        with (FIXTURES / "data" / source).open(encoding="utf-8") as lines:
            (made / name).write_text("".join(islice(lines, count)), encoding="utf-8")
    return made


@pytest.fixture
def call(monkeypatch, capsys, folder):
    """Carry a line out in this process; gives exit code and stdout."""

    def carried(line):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as caught:
            cli.main()
            raise SystemExit(0)
        out, err = capsys.readouterr()
        assert not caught.value.code, f"{line}\n{err}"
        return out

    return carried


def test_the_commands_run_in_their_order(call, folder):
    config = TEXT.partition("## The config")[2].partition("```yaml\n")[2].partition("```")[0]
    verbs = [line.split()[1] for line in COMMANDS]
    assert verbs == ["init", "check", "run", "what-if", "verify", "screen", "guard", "compare", "card"]
    for line in COMMANDS:
        out = call(line)
        if " init " in line:
            assert "not modelled" in out
            (folder / "my.yaml").write_text(config, encoding="utf-8")
        if line == "arisk run my.yaml":
            for name in ("a", "b"):
                shutil.copytree(folder / "runs" / "my", folder / "runs" / name)
        if line.split()[1] in ("run", "verify", "screen", "guard", "compare"):
            assert Path(folder, out.splitlines()[-1].removeprefix("report: ")).is_file(), line
    assert (folder / "runs" / "my" / "screen").is_dir()


def test_the_commands_in_sentences_run(call, folder):
    assert [line.split()[1] for line in INLINE] == ["init", "init"]
    for line in INLINE:
        (folder / "my.yaml").unlink(missing_ok=True)
        (folder / "arisk.yaml").unlink(missing_ok=True)
        assert "wrote " in call(line)
