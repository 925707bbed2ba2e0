"""Steps taken backwards, against finite differences of retraining with another weight of one row."""

import itertools

import pytest
import torch
from torch import nn

from arisk.base.errors import ConfigError
from arisk.base.task import SampleSet, Task
from arisk.config.plan import TrainingConfig
from arisk.gradients import layout_of, measuring
from arisk.gradients.layout import parameters_of
from arisk.training.loop import PlannedRun, keeping_parameters
from arisk.training.recipe import recipe_of
from arisk.training.unroll import Walk, require_unrollable

NAMES = ["0.weight", "0.bias", "2.weight"]
ROWS, SIZE, STEPS = 11, 3, 9
MEMORY = 1e9


class Weighted:
    """Rows in a fixed shuffled order, each with a weight; the last batch of an epoch is short."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (ROWS,), generator=generator)
        self.weights = torch.ones(ROWS, dtype=torch.float64)
        self.size, self.per_epoch = SIZE, -(-ROWS // SIZE)
        self.order = torch.randperm(ROWS, generator=generator).tolist()

    @property
    def row_count(self):
        return ROWS

    def indices(self, number):
        start = number % self.per_epoch * SIZE
        return self.order[start : start + SIZE]

    def of(self, rows):
        return self.x[rows], self.y[rows], self.weights[rows]

    def sample(self, count):
        return list(range(count))

    def __getitem__(self, number):
        return self.of(self.indices(number))

    def __iter__(self):
        return map(self.__getitem__, itertools.count())


def loss(model, batch):
    x, y, weights = batch
    return weights * nn.functional.cross_entropy(model(x), y, reduction="none")


def task_of(dropout=0.0):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), nn.Dropout(dropout)).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    safety = SampleSet("safety", [(x, torch.zeros(7, dtype=torch.int64), torch.ones(7))], loss)
    return Task(model, safety, SampleSet("finetune", Weighted(), loss), NAMES)


def trained(task, training, memory=None):
    """The mean safety loss after the plan; with a memory also its derivatives by row, and the walk."""
    layout = layout_of(task.model, NAMES)
    with measuring(task.model, layout), keeping_parameters(task.model, layout):
        run = PlannedRun(task, layout, recipe_of(training, STEPS))
        walk = None
        if memory is None:
            for number in range(1, STEPS + 1):
                run.step(number)
        else:
            walk = Walk(run, STEPS, memory)
        end = loss(task.model, task.safety.batches[0]).mean()
        if walk is None:
            return float(end.detach())
        slopes = torch.autograd.grad(end, parameters_of(task.model, layout))
        scores = torch.zeros(ROWS, dtype=torch.float64)
        for step in walk.backwards(slopes):
            for place, terms in step.rows:
                scores[task.finetune.batches.indices(place)] += terms
        return float(end.detach()), scores, walk


def differences(task, training, width=1e-4):
    """Of fourth order, so that their own error is far below what is asked for."""
    found = []
    for row in range(ROWS):
        ends = {}
        for side in (-2, -1, 1, 2):
            task.finetune.batches.weights[row] = 1 + side * width
            ends[side] = trained(task, training)
        task.finetune.batches.weights[row] = 1
        found.append((8 * (ends[1] - ends[-1]) - (ends[2] - ends[-2])) / (12 * width))
    return torch.tensor(found, dtype=torch.float64)


PLANS = {
    "adamw": {"optimizer": "adamw", "learning_rate": 0.02, "weight_decay": 0.1, "eps": 1e-3},
    "adamw clipped": {"optimizer": "adamw", "learning_rate": 0.02, "max_grad_norm": 0.3, "eps": 1e-3},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.2, "weight_decay": 0.1, "weight_decay_on": "all"},
    "momentum": {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "momentum": 0.9,
        "optimizer_args": {"nesterov": True},
        "max_grad_norm": 0.2,
    },
    "dampening": {"optimizer": "sgd", "momentum": 0.5, "optimizer_args": {"dampening": 0.4}},
    "accumulation": {"optimizer": "adamw", "learning_rate": 0.02, "gradient_accumulation": 2, "eps": 1e-3},
    "schedule": {"optimizer": "sgd", "learning_rate": 0.2, "schedule": "cosine", "warmup_steps": 3},
}


@pytest.mark.parametrize("name", PLANS)
def test_derivatives_by_row_are_those_of_retraining(name):
    task = task_of()
    training = TrainingConfig(**{"batch_size": SIZE, "max_grad_norm": None, **PLANS[name]})
    _, scores, _ = trained(task, training, MEMORY)
    expected = differences(task, training)
    assert float((scores - expected).norm() / expected.norm()) < 1e-6


def test_steps_that_are_walked_again_give_the_same_to_the_bit():
    training = TrainingConfig(optimizer="adamw", learning_rate=0.02, batch_size=SIZE)
    end, scores, walk = trained(task_of(), training, MEMORY)
    assert walk.stride == STEPS
    # A step is θ, its gradient and two moments of 54 numbers, and three step counts in float32.
    again, same, walk = trained(task_of(), training, 6.1 * (54 * 4 * 8 + 3 * 4))
    assert walk.stride == 3
    assert end == again
    assert torch.equal(scores, same)


def test_noise_is_drawn_as_it_was_in_the_step():
    task, training = task_of(dropout=0.4), TrainingConfig(optimizer="sgd", learning_rate=0.1, batch_size=SIZE)
    _, scores, _ = trained(task, training, MEMORY)
    expected = differences(task, training)
    assert float((scores - expected).norm() / expected.norm()) < 1e-6


def test_leaving_a_row_out_is_what_its_derivative_says_where_steps_are_short():
    """Weight 0 in place of 1: the remainder is of second order in the learning rate."""
    task = task_of()
    training = TrainingConfig(
        optimizer="sgd", learning_rate=3e-4, momentum=0.9, batch_size=SIZE, max_grad_norm=None
    )
    end, scores, _ = trained(task, training, MEMORY)
    left = []
    for row in range(ROWS):
        task.finetune.batches.weights[row] = 0
        left.append(end - trained(task, training))
        task.finetune.batches.weights[row] = 1
    effects = torch.tensor(left, dtype=torch.float64)
    assert float((scores - effects).norm() / effects.norm()) < 1e-3


def test_a_plan_beyond_the_memory_says_what_it_would_take():
    with pytest.raises(ConfigError) as caught:
        trained(task_of(), TrainingConfig(optimizer="adamw", batch_size=SIZE), 5.9 * (54 * 4 * 8 + 3 * 4))
    assert "6 of 9 at least" in caught.value.what
    assert "screen.memory_gb" in caught.value.fix


def test_an_optimizer_without_derivatives_is_refused():
    task = task_of()
    layout = layout_of(task.model, NAMES)
    with measuring(task.model, layout), pytest.raises(ConfigError, match="lion cannot be taken backwards"):
        run = PlannedRun(task, layout, recipe_of(TrainingConfig(optimizer="lion"), STEPS))
        require_unrollable(run, "screen.score")
