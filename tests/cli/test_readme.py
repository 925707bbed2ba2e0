"""Every command of the README runs as it stands there, on its config, with the embedded model behind it."""

import json
import re
import shlex
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

import arisk
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
#: The blocks of Python: the lines for a trainer, then those for any module.
IN_TRAINER, IN_PYTHON = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
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


def test_the_lines_for_a_trainer_run(folder, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    with (FIXTURES / "data" / "safety.jsonl").open(encoding="utf-8") as lines:
        Path("refusals.jsonl").write_text("".join(islice(lines, 32)), encoding="utf-8")
    model = folder / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [tokenizer(json.loads(line)["response"]) for line in texts]
    trainer = transformers.Trainer(
        transformers.AutoModelForCausalLM.from_pretrained(model),
        transformers.TrainingArguments(
            "out",
            max_steps=2,
            learning_rate=1e-7,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
        ),
        transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        rows,
        processing_class=tokenizer,
    )
    exec(IN_TRAINER, {"arisk": arisk, "trainer": trainer})
    assert trainer.state.global_step == 2
    assert any("arisk/level" in entry for entry in trainer.state.log_history)


def test_the_lines_for_any_module_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    model[0].requires_grad_(False)
    model.lora_A = torch.nn.Parameter(torch.randn(2, 4))
    model.lora_B = torch.nn.Parameter(torch.zeros(4, 2))

    def loss(module, batch):
        inputs, target = batch
        outputs = module(inputs) + inputs @ module.lora_A.T @ module.lora_B.T
        return (outputs - target).square().mean(1)

    batches = [[(torch.randn(4, 4), torch.randn(4, 4)) for _ in range(4)] for _ in range(2)]
    exec(
        IN_PYTHON,
        {
            "model": model,
            "safety_loader": batches[0],
            "safety_loss_fn": loss,
            "ft_loader": batches[1],
            "ft_loss_fn": loss,
        },
    )
    assert "<html" in Path("report.html").read_text(encoding="utf-8")
