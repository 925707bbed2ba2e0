"""Stage collect of small models, sharded by FSDP2 where torchrun runs this file; numbers as safetensors."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from arisk.anatomy.collect import collect
from arisk.base import processes
from arisk.base.errors import ConfigError
from arisk.base.task import SampleSet, Task
from arisk.config.plan import CollectConfig
from arisk.gradients import layout_of, mean_gradient, measuring, slice_batch
from arisk.models.selection import select_parameters
from tests.gradients.cases import CASES

MODELS = ("llama", "lora")


def measured(name, folder, prepare=lambda model: model):
    """The task, and what both stores give."""
    model, batch, loss_fn = CASES[name]()
    names = select_parameters(model, "auto")
    prepare(model)
    # Three batches for two ranks: the last one is alone.
    batches = [slice_batch(batch, a, b) for a, b in ((0, 2), (2, 3), (3, 4))]
    safety = SampleSet("safety", batches, loss_fn)
    task = Task(model, safety, SampleSet("finetune", batches, loss_fn), names)
    found = {}
    for store in ("gradients", "gram"):
        made = collect(task, CollectConfig(store=store), folder / name / store)
        for field in ("gram", "mean_gradient", "fisher_diagonal", "losses"):
            found[f"{name} {store} {field}"] = getattr(made, field)
    return task, found


def shard(model):
    """Every layer and the rest over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (processes.world(),))
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def main(folder):
    """Write the numbers, and what another stage says."""
    processes.join()
    torch.set_num_threads(1)
    numbers = {}
    for name in MODELS:
        task, found = measured(name, folder, shard)
        numbers.update(found)
    if processes.is_first():
        save_file(numbers, folder / "numbers.safetensors")
    layout = layout_of(task.model, task.parameter_names)
    with measuring(task.model, layout):
        try:
            mean_gradient(task.model, task.safety.batches[0], task.safety.loss_fn, layout)
        except ConfigError as err:
            sys.stdout.write(str(err))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    # A thread of gloo that FSDP2 leaves behind aborts the interpreter's own end now and then.
    os._exit(0)
