"""Files of other tools: each line is accounted for, and the plan says what their documentation says."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from arisk.base.errors import ConfigError
from arisk.config.imports import FAMILIES, import_files, nested
from arisk.config.plan import Config
from arisk.config.starter import account_text, imported_config, not_modelled
from arisk.config.yaml import load_config

CONFIGS = Path(__file__).parent.parent.parent / "fixtures" / "configs"
FILES = sorted(path for path in CONFIGS.iterdir() if path.is_file())


def written(tmp_path, text, name="train.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def plan_of(*paths, **options):
    return nested(import_files(paths, **options).plan)


def keys_of(path):
    """Every key of a file, by a reader of its own."""
    text = path.read_text()
    mapping = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return mapping, text.splitlines()


def outcomes(*paths):
    return {line.key: line.outcome for line in import_files(paths).lines if line.key}


def refused(*paths):
    with pytest.raises(ConfigError) as caught:
        import_files(paths)
    return caught.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_line_is_accounted_for(path):
    mapping, lines = keys_of(path)
    told = import_files([path]).lines
    for key, value in mapping.items():
        own = [line for line in told if line.key == key or line.key.startswith(f"{key}.")]
        assert own, f"nothing says what became of {key}"
        for inner in value if isinstance(value, dict) and own[0].key != key else ():
            assert any(line.key.startswith(f"{key}.{inner}") for line in own), f"{key}.{inner}"
    for line in told:
        assert line.note
        if line.key:
            assert line.key.rpartition(".")[2] in lines[line.number - 1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_plan_is_a_config_of_arisk(tmp_path, path):
    found = import_files([path])
    text = imported_config(found, model="m", safety="s.jsonl", finetune=None)
    config = load_config(written(tmp_path, text))
    assert config.model.path == "m"
    for line in found.lines:
        if line.outcome in ("other", "unknown"):
            assert line.key in text
    assert len([line for line in text.splitlines() if not line.startswith("#")]) <= 40


def test_axolotl():
    plan = plan_of(CONFIGS / "axolotl-lora.yml")
    assert plan["model"] == {
        "path": "./models/small-chat",
        "dtype": "bfloat16",
        "adapter": {
            "r": 16,
            "alpha": 32,
            "dropout": 0.05,
            "target_modules": "all-linear",
            "modules_to_save": ["embed_tokens"],
        },
    }
    assert plan["training"] == {
        "learning_rate": 2e-4,
        "optimizer": "adamw_bnb_8bit",
        "schedule": "cosine_with_min_lr",
        "schedule_args": {"min_lr_rate": 0.1},
        "warmup_steps": 10,
        "epochs": 3,
        "batch_size": 2,
        "gradient_accumulation": 4,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "precision": "bf16",
        "loraplus_lr_ratio": 16,
        "packing": "bfd",
    }
    shared = {"loss_on": "assistant", "val_set_size": 0.05, "max_length": 2048, "truncation": "drop"}
    assert plan["finetune"] == [
        {"path": "./data/kitchen.jsonl", "messages_column": "conversations", **shared},
        {"path": "someone/garden-instructions", "split": "train[:20%]", "format": "alpaca", **shared},
    ]
    found = outcomes(CONFIGS / "axolotl-lora.yml")
    assert found["sample_packing"] == found["chat_template"] == "other"
    assert found["plugins"] == found["special_tokens"] == found["lora_model_dir"] == "idle"


def test_llama_factory(tmp_path):
    plan = plan_of(CONFIGS / "llama-factory-lora.yaml")
    assert plan["model"] == {
        "path": "./models/small-chat",
        "dtype": "bfloat16",
        "trust_remote_code": False,
        # Twice the rank where no alpha is named.
        "adapter": {"r": 16, "alpha": 32, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    }
    kitchen, identity = plan["finetune"]
    assert kitchen["path"].endswith("fixtures/configs/data/kitchen.json")
    assert (kitchen["messages_column"], kitchen["max_samples"], kitchen["loss_on"]) == ("talk", 1000, "last")
    assert (identity["path"], identity["max_samples"]) == ("someone/identity", 50)
    assert plan["training"]["learning_rate"] == 1e-4
    assert plan["training"]["warmup_ratio"] == 0.1
    assert plan["training"]["precision"] == "bf16"
    full = written(tmp_path, "finetuning_type: full\nstage: sft\nmodel_name_or_path: m\nbf16: true\n")
    # Weights that train are held in float32, and only computed with in half precision.
    assert plan_of(full)["model"] == {"path": "m"}
    assert plan_of(full)["training"]["precision"] == "bf16"


def test_handbook():
    plan = plan_of(CONFIGS / "handbook-sft.yaml")
    assert plan["model"] == {"path": "./models/small-base", "dtype": "bfloat16"}
    first, second = plan["finetune"]
    assert first == {
        "path": "someone/kitchen-chat",
        "split": "train_sft",
        "max_length": 4096,
        "val_set_size": 100,
    }
    assert (second["subset"], second["weight"]) == ("short", 0.5)
    assert plan["training"]["schedule_args"] == {"min_lr_rate": 0.1}
    assert plan["run"]["seed"] == 42
    found = outcomes(CONFIGS / "handbook-sft.yaml")
    assert found["chat_template"] == "other"
    assert found["packing"] == found["packing_strategy"] == "taken"
    assert plan["training"]["packing"] == "bfd"
    assert found["max_steps"] == "idle"
    # Two sets: rows set aside of both together there.
    assert found["dataset_mixture.test_split_size"] == "other"


def test_the_older_mixture_of_the_handbook(tmp_path):
    text = (
        "model_name_or_path: m\ndataset_mixer: {a/b: 1.0, c/d: 0.5}\ndataset_splits: [train_sft, test_sft]\n"
    )
    assert plan_of(written(tmp_path, text))["finetune"] == [
        {"path": "a/b", "split": "train_sft", "max_length": 1024},
        {"path": "c/d", "split": "train_sft", "weight": 0.5, "max_length": 1024},
    ]


def test_torchtune(tmp_path):
    plan = plan_of(CONFIGS / "torchtune-qlora.yaml")
    assert plan["model"] == {
        "path": "./models/small-chat",
        "dtype": "bfloat16",
        "quantization": "4bit",
        "adapter": {
            "r": 16,
            "alpha": 32,
            "dropout": 0.0,
            "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        },
    }
    training = plan["training"]
    # torch's AdamW decays everything by 0.01 unless told otherwise, and nothing is clipped.
    assert (training["weight_decay"], training["weight_decay_on"]) == (0.01, "all")
    assert training["max_grad_norm"] is None
    assert (training["schedule"], training["warmup_steps"], training["epochs"]) == ("cosine", 100, 2)
    paged = written(tmp_path, "optimizer: {_component_: bitsandbytes.optim.PagedAdamW8bit, lr: 2e-5}\n")
    assert plan_of(paged)["training"]["weight_decay"] == 0.01
    assert plan["finetune"]["path"] == "./data/kitchen.json"
    assert plan["finetune"]["loss_on"] == "assistant"


SFT = "model_name_or_path: m\nlearning_rate: 1e-4\n"
FACTORY = "model_name_or_path: m\nlora_rank: 8\ncutoff_len: 64\n"
AXOLOTL = "base_model: m\ndatasets: [{path: d.jsonl}]\n"
TUNE = "tokenizer: {_component_: t}\ndataset: {_component_: torchtune.datasets.%s, packed: true%s}"


@pytest.mark.parametrize(
    ("text", "packing", "differing"),
    [
        (SFT + "packing: false\npacking_strategy: wrapped", None, []),
        (SFT + "padding_free: true", None, []),
        (SFT + "packing: true", "bfd", []),
        (SFT + "packing: true\npacking_strategy: wrapped\neval_packing: false", "wrapped", []),
        (SFT + "packing: true\npacking_strategy: bfd_split", "bfd", ["packing_strategy"]),
        (SFT + "packing: true\npacking_strategy: knapsack", "bfd", ["packing_strategy"]),
        (AXOLOTL + "sample_packing: true", "bfd", ["sample_packing"]),
        (AXOLOTL + "sample_packing: false", None, []),
        (FACTORY + "packing: true", "bfd", ["packing"]),
        (FACTORY + "neat_packing: true", "bfd", ["neat_packing"]),
        (FACTORY + "packing: true\nneat_packing: true", "bfd", ["packing"]),
        (FACTORY + "stage: pt", "wrapped", []),
        (FACTORY + "stage: pt\npacking: false", None, []),
        (TUNE % ("chat_dataset, source: d", ""), "bfd", ["dataset"]),
        (TUNE % ("text_completion_dataset, source: d", ""), "wrapped", ["dataset"] * 2),
        (TUNE % ("text_completion_dataset, source: d", ", split_across_pack: false"), "bfd", ["dataset"]),
    ],
)
def test_packing_is_planned(tmp_path, text, packing, differing):
    """What is done in another way than by the tool is named, and nothing else."""
    path = written(tmp_path, text)
    found = import_files([path])
    assert found.plan.get("training.packing") == packing
    lines = [line for line in found.lines if line.outcome in ("other", "unknown")]
    assert [line.key for line in lines if line.key != "optimizer"] == differing
    if packing:
        assert plan_of(path)["training"]["packing"] == packing


def test_packed_rows_are_no_number_of_steps(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n' * 10)
    found = import_files([written(tmp_path, SFT + "packing: true\nnum_train_epochs: 2\n")])
    imported_config(found, model="m", safety="s", finetune=str(rows))
    assert "`arisk check` counts them" in found.lines[-1].note
    assert "training.max_steps" not in found.plan


def test_trl_and_its_defaults(tmp_path):
    plan = plan_of(CONFIGS / "trl-sft.yaml")
    assert plan["model"]["adapter"]["use_dora"] is True
    assert plan["model"]["quantization"] == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
    }
    assert plan["finetune"]["loss_on"] == "assistant"
    assert plan["training"]["learning_rate"] == 1e-4
    assert outcomes(CONFIGS / "trl-sft.yaml")["favourite_colour"] == "unknown"
    bare = plan_of(written(tmp_path, "model_name_or_path: m\ndataset_name: d\nmax_length: null\n"))
    assert bare["finetune"]["max_length"] == 131_072
    bare = plan_of(written(tmp_path, "model_name_or_path: m\ndataset_name: d\n"))
    assert bare["finetune"]["max_length"] == 1024
    assert "adapter" not in bare["model"]
    assert bare["training"]["learning_rate"] == 2e-5
    assert bare["training"]["precision"] == "bf16"
    assert bare["training"]["epochs"] == 3


def test_a_json_of_arguments_and_an_adapter_make_one_plan():
    plan = plan_of(CONFIGS / "training_args.json", CONFIGS / "adapter_config.json")
    assert plan["training"]["warmup_ratio"] == 0.05
    assert plan["training"]["betas"] == [0.9, 0.95]
    assert plan["training"]["optimizer"] == "paged_adamw_8bit"
    assert plan["model"]["path"] == "./models/small-chat"
    assert plan["model"]["adapter"]["peft"] == {"trainable_token_indices": [5, 6]}
    found = outcomes(CONFIGS / "training_args.json", CONFIGS / "adapter_config.json")
    assert found["label_smoothing_factor"] == "other"
    assert found["weight_of_the_moon"] == "unknown"


def test_every_argument_of_the_installed_trainer_is_known(tmp_path):
    """The oracle is transformers itself: what it writes has no key without a rule, and its own values."""
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            max_steps=50,
            warmup_steps=0.1,
            lr_scheduler_type="polynomial",
            optim="adafactor",
            gradient_accumulation_steps=3,
        )
    path = written(tmp_path, arguments.to_json_string(), "training_args.json")
    found = import_files([path])
    assert {line.key for line in found.lines if line.outcome in ("unknown", "other")} == set()
    plan = found.plan
    assert plan["training.learning_rate"] == arguments.learning_rate
    assert plan["training.schedule"] == "polynomial"
    assert plan["training.optimizer"] == "adafactor"
    assert plan["training.batch_size"] == arguments.per_device_train_batch_size
    assert plan["training.gradient_accumulation"] == 3
    assert plan["training.max_steps"] == 50
    assert "training.epochs" not in plan
    (warmup,) = (line for line in found.lines if line.key == "warmup_steps")
    assert warmup.outcome == "computed"
    assert f"{arguments.get_warmup_steps(50)} of 50 steps" in warmup.note


def test_every_key_of_the_installed_peft_is_known(tmp_path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, bias="all").save_pretrained(str(tmp_path))
    found = import_files([tmp_path])
    assert {line.key for line in found.lines if line.outcome in ("unknown", "other")} == set()
    adapter = nested(found.plan)["model"]["adapter"]
    made = Config.model_validate(
        {"model": {"path": "m", "adapter": adapter}, "safety": {"path": "s"}, "finetune": {"path": "f"}}
    ).model.adapter
    assert made is not None
    assert (made.r, made.alpha, made.use_rslora, made.bias) == (4, 6, True, "all")


def test_devices_multiply_the_rows_of_a_step():
    one, four = (plan_of(CONFIGS / "trl-sft.yaml", devices=n)["training"] for n in (1, 4))
    assert four["gradient_accumulation"] == 4 * one["gradient_accumulation"]
    assert {**four, "gradient_accumulation": 0} == {**one, "gradient_accumulation": 0}


def test_epochs_of_a_file_of_rows_are_told_in_steps(tmp_path):
    rows = written(tmp_path, '{"text": "a"}\n' * 103 + "\n", "rows.jsonl")
    path = written(tmp_path, "num_train_epochs: 3\nper_device_train_batch_size: 4\nlearning_rate: 1e-5\n")
    found = import_files([path], devices=2)
    imported_config(found, model="m", safety="s", finetune=str(rows))
    # 103 rows at 8 a step are 13 steps, the last one short, in each of three epochs.
    assert [
        line.note.partition(":")[0] for line in found.lines if not line.key and line.outcome == "computed"
    ] == ["39 optimizer steps"]


def test_axolotl_warms_up_over_three_per_cent_by_default(tmp_path):
    base = "base_model: m\nadapter: lora\nmicro_batch_size: 1\n"
    assert plan_of(written(tmp_path, base))["training"]["warmup_ratio"] == 0.03
    for steps, expected in ((1000, 30), (40, 2), (9000, 100)):
        path = written(tmp_path, f"{base}max_steps: {steps}\n")
        assert plan_of(path)["training"]["warmup_steps"] == expected


def test_what_cannot_be_carried_out_has_a_stand_in_and_is_said(tmp_path):
    text = "base_model: m\nadapter: lora\nlr_scheduler: rex\noptimizer: ademamix\nlora_r: 4\n"
    path = written(tmp_path, text)
    plan = plan_of(path)
    assert (plan["training"]["schedule"], plan["training"]["optimizer"]) == ("cosine", "adamw")
    assert outcomes(path)["lr_scheduler"] == outcomes(path)["optimizer"] == "other"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("base_model: m\nadapter: lora\nrl: dpo\n", "preference training"),
        ("stage: dpo\nfinetuning_type: lora\n", "preference training"),
        ("stage: rm\nfinetuning_type: lora\n", "reward model"),
        ("model_name_or_path: m\nbeta: 0.1\nlearning_rate: 1e-6\n", "preference training"),
        ("loss: {_component_: torchtune.rlhf.loss.DPOLoss}\n", "preference training"),
        ("learning_rate: fast\nnum_train_epochs: 1\n", "number"),
        ("learning_rate: .nan\nnum_train_epochs: 1\n", "finite"),
        ("per_device_train_batch_size: 1.5\nnum_train_epochs: 1\n", "whole number"),
        ("num_train_epochs: [1]\nlearning_rate: 1e-5\n", "number"),
        ("learning_rate: 1e-5\nlr_scheduler_kwargs: 3\nmax_steps: 5\n", "mapping"),
        ("model: {path: m}\nsafety: {path: s}\n", "config of arisk"),
        ("hello: world\n", "no training config"),
        ("", "empty"),
        ("- 1\n", "list"),
        ("just words", "str"),
        ("a: [1\n", "YAML"),
        ("a: {b: 1}: 2\n", "YAML"),
        ("learning_rate: 1e-5\nlearning_rate: 2e-5\n", "given twice"),
    ],
)
def test_what_is_no_plan_is_refused_with_its_place(tmp_path, text, what):
    path = written(tmp_path, text)
    problem = refused(path)
    assert what in problem.what
    assert problem.where.startswith(str(path))
    assert problem.exit_code == 2


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("training_args.bin", b"PK\x03\x04", "pickle"),
        ("arguments", b"PK\x03\x04data", "pickle"),
        ("arguments", b"\x80\x04\x95", "pickle"),
        ("train.py", b"print()", "script"),
        ("model.safetensors", b"\0\0", "weights"),
        ("rows.jsonl", b"{}", "rows"),
        ("bad.json", b'{"a": 1,}', "JSON"),
        ("twice.json", b'{"a": 1, "a": 2}', "given twice"),
        ("deep.json", b"[" * 100_000, "JSON"),
        ("long.json", b'{"seed": ' + b"9" * 5000 + b"}", "JSON"),
        ("config.json", b'{"architectures": ["X"], "model_type": "x"}', "model"),
        ("adapter_config.json", b'{"peft_type": "IA3"}', "IA3"),
        ("latin.yaml", "größe: 1".encode("latin-1"), "cannot be read"),
    ],
)
def test_files_that_are_no_config(tmp_path, name, content, what):
    path = tmp_path / name
    path.write_bytes(content)
    problem = refused(path)
    assert what in problem.what
    assert str(path) in problem.where
    if what == "pickle":
        assert "to_json_string" in problem.fix


def test_missing_files_folders_and_devices(tmp_path):
    assert "does not exist" in refused(tmp_path / "no.yaml").what
    assert "folder" in refused(tmp_path).what
    assert "no regular file" in refused(Path("/dev/zero")).what


def test_files_that_contradict_each_other(tmp_path):
    other = written(
        tmp_path, '{"peft_type": "LORA", "base_model_name_or_path": "another"}', "adapter_config.json"
    )
    problem = refused(CONFIGS / "trl-sft.yaml", other)
    assert "model.path" in problem.what
    assert "trl-sft.yaml, line 2" in problem.where
    assert "adapter_config.json, line 1" in problem.where


def test_a_value_that_arisk_refuses_is_told_where_it_came_from(tmp_path):
    path = written(tmp_path, "learning_rate: 0\nnum_train_epochs: 1\nmax_grad_norm: -1\n")
    with pytest.raises(ConfigError) as caught:
        imported_config(import_files([path]), model="m", safety="s", finetune="f")
    places = {problem.where for problem in (caught.value, *caught.value.also)}
    assert f"{path}, line 1: learning_rate (as `training.learning_rate`)" in places
    assert f"{path}, line 3: max_grad_norm (as `training.max_grad_norm`)" in places


def test_foreign_text_reaches_no_terminal_as_it_is(tmp_path):
    path = written(tmp_path, 'learning_rate: 1\nnum_train_epochs: 1\n"k\\e]0;x\\a": "v\\e[2J"\n')
    text = account_text(import_files([path]).lines)
    assert "\x1b" not in text
    assert "\a" not in text
    assert "\\x1b" in text


def test_the_table_of_families_recognises_each_file_once():
    for path in FILES:
        mapping, _ = keys_of(path)
        special = [family for family in FAMILIES[:-1] if family.recognise(mapping)]
        assert len(special) <= 1, path


def test_init_writes_a_config_that_loads_and_tells_all(tmp_path):
    out = tmp_path / "plan.yaml"
    command = [sys.executable, "-m", "arisk", "init", str(out), "--safety", "refusals.jsonl"]
    command += ["--from", str(CONFIGS / "training_args.json"), "--from", str(CONFIGS / "adapter_config.json")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for key in json.loads((CONFIGS / "training_args.json").read_text()):
        assert key in done.stdout
    config = load_config(out)
    assert config.safety is not None
    assert config.safety.path == "refusals.jsonl"
    assert config.training.max_grad_norm == 0.3
    told = [line.partition(":")[0] for line in not_modelled(out)]
    lines = import_files([CONFIGS / "training_args.json", CONFIGS / "adapter_config.json"]).lines
    left = [line.key for line in lines if line.outcome in ("other", "unknown")]
    assert [key.partition(" (line")[0] for key in told] == left
    assert left
    again = subprocess.run(command, check=False, capture_output=True, text=True)
    assert again.returncode == 2
    command[4] = str(tmp_path / "no-such-folder" / "plan.yaml")
    assert subprocess.run(command, check=False, capture_output=True, text=True).returncode == 2
