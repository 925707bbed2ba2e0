"""Running the model: per-sample gradients, mean gradients, Hessian-vector products, and their store."""

from arisk.gradients.curvature import HvpPlan, choose_hvp, hvp
from arisk.gradients.engines import (
    ENGINES,
    EngineChoice,
    batch_invariance,
    choose_engine,
    mean_gradient,
    per_sample_gradients,
    per_sample_parts,
)
from arisk.gradients.factors import Sink
from arisk.gradients.layout import (
    ParameterLayout,
    batch_size,
    evaluating,
    is_sharded,
    layout_of,
    map_tensors,
    measuring,
    module_of,
    move_batch,
    parameters_of,
    recomputing,
    slice_batch,
)
from arisk.gradients.store import GradientStore

__all__ = [
    "ENGINES",
    "EngineChoice",
    "GradientStore",
    "HvpPlan",
    "ParameterLayout",
    "Sink",
    "batch_invariance",
    "batch_size",
    "choose_engine",
    "choose_hvp",
    "evaluating",
    "hvp",
    "is_sharded",
    "layout_of",
    "map_tensors",
    "mean_gradient",
    "measuring",
    "module_of",
    "move_batch",
    "parameters_of",
    "per_sample_gradients",
    "per_sample_parts",
    "recomputing",
    "slice_batch",
]
