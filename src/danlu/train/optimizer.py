"""AdamW in two groups: matrices decay, biases and norms (everything with fewer than two dimensions) do not.

    optimizer = build_optimizer(root, config)
    set_learning_rate(optimizer, 3e-4)      # before each step; the schedule is a pure function of the step
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from danlu.core.config import Config
from danlu.core.errors import ConfigError


class OptimizerConfig(Config):
    """AdamW's settings, named as in transformers."""

    learning_rate: float = Field(1e-4, gt=0, description="the highest learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; biases and norms never decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="how long the mean of gradients remembers")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="how long the mean of squared gradients remembers")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the denominator")
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this norm; 0 leaves them")


def parameter_groups(root: nn.Module, weight_decay: float, scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Trainable parameters as AdamW's groups, a tied weight once: matrices decay, everything else does not.

    `scales` gives the parameters whose names begin so a rate of their own, as a multiple of the learning rate.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad:
            scale = next((scale for prefix, scale in scales.items() if name.startswith(prefix)), 1.0)
            groups.setdefault((scale, parameter.ndim >= 2), []).append(parameter)
    return [{"params": parameters, "weight_decay": weight_decay if decays else 0.0, "scale": scale}
            for (scale, decays), parameters in groups.items()]


def build_optimizer(root: nn.Module, config: OptimizerConfig, scales: Mapping[str, float] = {}) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with one fused kernel per group (deterministic on every device)."""
    groups = parameter_groups(root, config.weight_decay, scales)
    if not groups:
        raise ConfigError("the model has no trainable parameter")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
                             eps=config.adam_epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of every group for the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]
