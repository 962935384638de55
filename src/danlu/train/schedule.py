"""The learning rate as a pure function of the step, with the names and the numbers of transformers' schedulers.

Nothing is counted or stored, so a resumed run cannot disagree with an uninterrupted one, and neither accumulation nor
the number of processes can step it too often.

    learning_rate = config.learning_rate * lr_factor(config, step, total_steps)      # step 0, 1, 2, …
"""

import math
from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator

from danlu.core.config import Config

SchedulerType = Literal["linear", "cosine", "cosine_with_min_lr", "cosine_with_restarts", "polynomial", "constant",
                        "constant_with_warmup", "inverse_sqrt", "warmup_stable_decay"]

# The settings that each type reads besides its name. One that is set and not read would be a lie.
_WARMUP = {"warmup_steps", "warmup_ratio"}
_READS: dict[str, set[str]] = {
    "constant": set(),
    "constant_with_warmup": _WARMUP,
    "linear": _WARMUP,
    "cosine": _WARMUP | {"num_cycles"},
    "cosine_with_min_lr": _WARMUP | {"num_cycles", "min_lr_ratio"},
    "cosine_with_restarts": _WARMUP | {"num_cycles"},
    "polynomial": _WARMUP | {"power", "min_lr_ratio"},
    "inverse_sqrt": _WARMUP,
    "warmup_stable_decay": _WARMUP | {"num_cycles", "min_lr_ratio", "decay_ratio", "decay_type"},
}


class ScheduleConfig(Config):
    """How the learning rate moves. Names as in transformers; ratios are of all steps."""

    lr_scheduler_type: SchedulerType = Field("linear", description="shape of the learning rate over the steps")
    warmup_ratio: float = Field(0.0, ge=0, le=1, description="share of all steps in which the rate rises from 0")
    warmup_steps: int = Field(0, ge=0, description="steps in which the rate rises from 0; instead of warmup_ratio")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="the lowest rate, as a share of learning_rate")
    decay_ratio: float = Field(0.1, ge=0, le=1, description="warmup_stable_decay: share of all steps that decay")
    decay_type: Literal["cosine", "linear", "1-sqrt"] = Field("cosine", description="warmup_stable_decay: its end")
    power: float = Field(1.0, gt=0, description="polynomial: the exponent")
    num_cycles: float | None = Field(None, gt=0, description="cosine: waves (default half a wave; one restart)")

    @model_validator(mode="after")
    def _read_by_the_type(self) -> "ScheduleConfig":
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError("warmup_ratio and warmup_steps cannot both be set")
        given = {name for name in ScheduleConfig.model_fields
                 if name != "lr_scheduler_type" and getattr(self, name) != ScheduleConfig.model_fields[name].default}
        unread = sorted(given - _READS[self.lr_scheduler_type])
        if unread:
            raise ValueError(f"lr_scheduler_type {self.lr_scheduler_type} does not use {', '.join(unread)}")
        return self


def num_warmup_steps(config: ScheduleConfig, total_steps: int) -> int:
    """The steps of the warmup: `warmup_steps`, or the ratio of all steps rounded up."""
    return config.warmup_steps or math.ceil(total_steps * config.warmup_ratio)


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """The learning rate of one step as a share of `learning_rate`.

    step         0 for the first optimizer step
    total_steps  all optimizer steps of the training
    """
    warmup = num_warmup_steps(config, total_steps)
    if config.lr_scheduler_type == "constant":
        return 1.0
    if step < warmup:
        return _warmup(config, step / max(1, warmup))
    return _SHAPES[config.lr_scheduler_type](config, step, warmup, total_steps)


def _warmup(config: ScheduleConfig, progress: float) -> float:
    if config.lr_scheduler_type == "warmup_stable_decay":  # the only type whose warmup starts at its lowest rate
        return _above(config, progress)
    return progress


def _above(config: ScheduleConfig, factor: float) -> float:
    """A factor in 0 … 1, squeezed into min_lr_ratio … 1."""
    return max(0.0, factor * (1.0 - config.min_lr_ratio) + config.min_lr_ratio)


def _progress(step: int, warmup: int, total_steps: int) -> float:
    return (step - warmup) / max(1, total_steps - warmup)


def _wave(config: ScheduleConfig, progress: float) -> float:
    cycles = 0.5 if config.num_cycles is None else config.num_cycles
    return 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * progress))


def _constant(config: ScheduleConfig, step: int, warmup: int, total_steps: int) -> float:
    return 1.0


def _linear(config: ScheduleConfig, step: int, warmup: int, total_steps: int) -> float:
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup))


def _cosine(config: ScheduleConfig, step: int, warmup: int, total_steps: int) -> float:
    return _above(config, _wave(config, _progress(step, warmup, total_steps)))


def _restarts(config: ScheduleConfig, step: int, warmup: int, total_steps: int) -> float:
    progress = _progress(step, warmup, total_steps)
    cycles = 1.0 if config.num_cycles is None else config.num_cycles
    return 0.0 if progress >= 1.0 else max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0))))


def _polynomial(config: ScheduleConfig, step: int, warmup: int, total_steps: int) -> float:
    if step > total_steps:
        return config.min_lr_ratio
    left = 1 - (step - warmup) / max(1, total_steps - warmup)
    return (1.0 - config.min_lr_ratio) * left**config.power + config.min_lr_ratio


def _inverse_sqrt(config: ScheduleConfig, step: int, warmup: int, total_steps: int) -> float:
    scale = warmup or 10_000
    return 1.0 / math.sqrt((step + scale - warmup) / scale)


def _stable_decay(config: ScheduleConfig, step: int, warmup: int, total_steps: int) -> float:
    decay = math.ceil(total_steps * config.decay_ratio)
    stable = max(0, total_steps - warmup - decay)
    if step < warmup + stable:
        return 1.0
    if step >= warmup + stable + decay:
        return config.min_lr_ratio
    progress = (step - warmup - stable) / max(1, decay)
    shapes = {"linear": 1.0 - progress, "1-sqrt": 1.0 - math.sqrt(progress), "cosine": _wave(config, progress)}
    return _above(config, shapes[config.decay_type])


_SHAPES: dict[str, Callable[[ScheduleConfig, int, int, int], float]] = {
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_min_lr": _cosine,
    "cosine_with_restarts": _restarts,
    "polynomial": _polynomial,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _stable_decay,
}
