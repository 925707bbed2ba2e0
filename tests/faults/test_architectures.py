"""Tiny random models of the architectures people tune: each runs, or is refused with the reason.

What is expected stands in the table of the contributing notes, one row for each architecture.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from arisk.base.artifacts import read_record
from arisk.base.errors import AriskError
from arisk.base.terminal import StageDisplay
from arisk.catalogue import catalogue
from arisk.config.plan import Config
from arisk.cost.check import check_task
from arisk.engine.run import run_stages
from arisk.forecast.record import RolloutResult

ROOT = Path(__file__).parent.parent.parent
NOTES = ROOT / ".github" / "CONTRIBUTING.md"
DATA = ROOT / "fixtures" / "data"

TOKENS = {"vocab_size": 430, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 256,
    "head_dim": 8,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
BLOOM = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
EXPERTS = {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {
    **{key: value for key, value in LLAMA.items() if key != "head_dim"},
    "num_experts": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 4,
}
SHAPES = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "phi3": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": LLAMA,
    "opt": {**BLOOM, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 256},
    "bloom": BLOOM,
    "falcon": BLOOM,
    "mixtral": {**LLAMA, "num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "gpt_oss": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "jamba": HYBRID,
    "xlnet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
}
PLAN = {
    "why": "full",
    "run": {"threads": 1},
    "safety": {"path": str(DATA / "safety.jsonl"), "max_samples": 4},
    "finetune": {"path": str(DATA / "risky.jsonl"), "max_samples": 6},
    "training": {"max_steps": 4, "batch_size": 2},
    "behaviour": {"prompts": 2, "ordinary_prompts": 0, "tokens": 4},
    "rollout": {"pilot_steps": 2, "segments": 1, "batches_per_segment": 2},
    "score": {
        "batches": 2,
        "hvp_batches": 1,
        "krylov_dim": 2,
        "nulls": 4,
        "examples": 2,
        "probe_points": 2,
    },
}


def expected():
    """(architecture, mode, cell) of the table in the notes."""
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+?) \|$", NOTES.read_text(encoding="utf-8"), re.MULTILINE)
    return [
        pytest.param(name, mode, cell, id=f"{name}-{mode}")
        for name, *cells in rows
        if name in SHAPES
        for mode, cell in zip(("lora", "full"), cells, strict=True)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of an architecture, made when it is first asked for."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "fixtures" / "tiny-aligned")

    def saved(name):
        folder = root / name
        if not folder.exists():
            torch.manual_seed(0)
            shape = AutoConfig.for_model(name, **SHAPES[name], **TOKENS)
            AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    return saved


def test_every_architecture_is_in_the_table():
    assert [case.id for case in expected()] == [
        f"{name}-{mode}" for name in SHAPES for mode in ("lora", "full")
    ]


@pytest.mark.parametrize(("name", "mode", "cell"), expected())
def test_an_architecture_runs_or_is_refused(folders, tmp_path, name, mode, cell):
    adapter = {"adapter": {"r": 2}} if mode == "lora" else {}
    config = Config.model_validate({**PLAN, "model": {"path": str(folders(name)), **adapter}})
    if not cell.startswith("runs"):
        with pytest.raises(AriskError) as caught:
            check_task(config)
        assert cell.removeprefix("refused: ") in caught.value.what
        return
    checked = check_task(config)
    assert checked["trained_parameters"]
    run_stages(
        catalogue(), config, run_dir=tmp_path, show=StageDisplay(quiet=True), command="", last="collect"
    )
    collected = json.loads((tmp_path / "collect" / "record.json").read_text())["values"]
    assert f"runs ({collected['engine']['name']})" == cell
    assert collected["parameter_names"] == checked["trained_parameters"]
    rolled = read_record(tmp_path / "rollout", RolloutResult)
    assert rolled.status == "measured"
    assert torch.tensor(rolled.finetune_loss)[1:].isfinite().all()
