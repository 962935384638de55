"""The learning rate's schedules are transformers' own, at every step, and options that nothing reads are refused."""

import math

import pytest
import torch
from transformers import get_scheduler

from danlu.core.config import read_config
from danlu.core.errors import ConfigError
from danlu.train.schedule import ScheduleConfig, lr_factor, num_warmup_steps

RATE = 0.5
TOTAL = 37

CASES = [
    ({"lr_scheduler_type": "constant"}, "constant", {}),
    ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, "constant_with_warmup", {}),
    ({"lr_scheduler_type": "linear"}, "linear", {}),
    ({"lr_scheduler_type": "linear", "warmup_ratio": 0.1}, "linear", {}),
    ({"lr_scheduler_type": "linear", "warmup_steps": TOTAL}, "linear", {}),
    ({"lr_scheduler_type": "cosine", "warmup_steps": 4}, "cosine", {}),
    ({"lr_scheduler_type": "cosine", "num_cycles": 1.5}, "cosine", {"num_cycles": 1.5}),
    ({"lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 3, "min_lr_ratio": 0.1}, "cosine_with_min_lr",
     {"min_lr_rate": 0.1}),
    ({"lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 3, "num_cycles": 3}, "cosine_with_restarts",
     {"num_cycles": 3}),
    ({"lr_scheduler_type": "cosine_with_restarts"}, "cosine_with_restarts", {}),
    ({"lr_scheduler_type": "polynomial", "warmup_steps": 3, "power": 2.0, "min_lr_ratio": 0.01}, "polynomial",
     {"power": 2.0, "lr_end": 0.01 * RATE}),
    ({"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 6}, "inverse_sqrt", {}),
    ({"lr_scheduler_type": "inverse_sqrt"}, "inverse_sqrt", {}),
    *[({"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 4, "decay_ratio": 0.3, "decay_type": decay,
        "min_lr_ratio": 0.05}, "warmup_stable_decay",
       {"num_decay_steps": math.ceil(0.3 * TOTAL), "decay_type": decay, "min_lr_ratio": 0.05})
      for decay in ("cosine", "linear", "1-sqrt")],
]


@pytest.mark.parametrize(("ours", "name", "theirs"), CASES)
def test_equal_to_transformers_at_every_step(ours: dict, name: str, theirs: dict) -> None:
    config = ScheduleConfig(**ours)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps(config, TOTAL), TOTAL, theirs)
    for step in range(TOTAL):
        assert RATE * lr_factor(config, step, TOTAL) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12), step
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("kind", sorted({case[0]["lr_scheduler_type"] for case in CASES}))
@pytest.mark.parametrize("total", [1, 2, 10])
def test_short_trainings_have_finite_rates(kind: str, total: int) -> None:
    warmup = {} if kind == "constant" else {"warmup_ratio": 0.5}
    for config in (ScheduleConfig(lr_scheduler_type=kind), ScheduleConfig(lr_scheduler_type=kind, **warmup)):
        factors = [lr_factor(config, step, total) for step in range(total)]
        assert all(0.0 <= factor <= 1.0 for factor in factors)


def test_warmup_rounds_up_like_transformers() -> None:
    assert num_warmup_steps(ScheduleConfig(warmup_ratio=0.1), 37) == 4
    assert num_warmup_steps(ScheduleConfig(warmup_steps=7), 37) == 7


@pytest.mark.parametrize(("values", "said"), [
    ({"warmup_ratio": 0.1, "warmup_steps": 3}, "cannot both be set"),
    ({"lr_scheduler_type": "linear", "min_lr_ratio": 0.1}, "linear does not use min_lr_ratio"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 2}, "constant does not use warmup_steps"),
    ({"lr_scheduler_type": "cosine", "power": 2.0}, "cosine does not use power"),
    ({"lr_scheduler_type": "coseno"}, "lr_scheduler_type"),
    ({"warmup_ratio": 1.5}, "warmup_ratio"),
])
def test_what_cannot_be_meant_is_refused(values: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_config(ScheduleConfig, values, lambda path: "recipe.yaml:1")
