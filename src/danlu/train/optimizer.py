"""AdamW in two groups: matrices decay, biases and norms (everything with fewer than two dimensions) do not.

    optimizer = build_optimizer(root, config)
    set_learning_rate(optimizer, 3e-4)      # before each step; the schedule is a pure function of the step
"""

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


def decay_groups(root: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(decaying, not decaying) trainable parameters; a tied weight once."""
    parameters = [parameter for parameter in root.parameters() if parameter.requires_grad]
    return ([parameter for parameter in parameters if parameter.ndim >= 2],
            [parameter for parameter in parameters if parameter.ndim < 2])


def build_optimizer(root: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with one fused kernel per group (deterministic on every device)."""
    decaying, plain = decay_groups(root)
    if not decaying and not plain:
        raise ConfigError("the model has no trainable parameter")
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate,
                             betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of every group for the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
