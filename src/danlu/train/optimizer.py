"""AdamW in groups: matrices decay, biases and norms (everything with fewer than two dimensions) do not.

LoRA+ (arXiv:2402.12354, section 4) gives the adapters' B matrices a higher rate than the A matrices: η_B = ratio · η_A.

    optimizer = build_optimizer(root, config)
    set_learning_rate(optimizer, 3e-4)      # before each step; the schedule is a pure function of the step
"""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, model_validator
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
    loraplus_lr_ratio: float | None = Field(None, gt=0, description="LoRA+: rate of the adapters' B over that of their A")
    loraplus_lr_embedding: float = Field(1e-6, gt=0, description="LoRA+: highest rate of adapters on embeddings")

    @model_validator(mode="after")
    def _loraplus_is_read(self) -> "OptimizerConfig":
        if "loraplus_lr_embedding" in self.model_fields_set and self.loraplus_lr_ratio is None:
            raise ValueError("loraplus_lr_embedding is read with loraplus_lr_ratio only")
        return self

    def rate_of(self, name: str, parameter: nn.Parameter) -> float:
        """A parameter's learning rate as a multiple of `learning_rate`: 1 but for adapters under LoRA+.

        As in peft: B matrices and vectors learn at the ratio, everything on embeddings at its own rate, the rest at 1.
        """
        if self.loraplus_lr_ratio is None:
            return 1.0
        if "lora_embedding_" in name:
            return self.loraplus_lr_embedding / self.learning_rate
        return self.loraplus_lr_ratio if "lora_B" in name or parameter.ndim == 1 else 1.0


def parameter_groups(root: nn.Module, config: OptimizerConfig, scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Trainable parameters as AdamW's groups, a tied weight once: matrices decay, everything else does not.

    `scales` gives the parameters whose names begin so a rate of their own, as a multiple of the learning rate.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in root.named_parameters():
        if parameter.requires_grad:
            scale = next((scale for prefix, scale in scales.items() if name.startswith(prefix)), 1.0)
            groups.setdefault((scale * config.rate_of(name, parameter), parameter.ndim >= 2), []).append(parameter)
    return [{"params": parameters, "weight_decay": config.weight_decay if decays else 0.0, "scale": scale}
            for (scale, decays), parameters in groups.items()]


def build_optimizer(root: nn.Module, config: OptimizerConfig, scales: Mapping[str, float] = {}) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with one fused kernel per group (deterministic on every device).

    Raises ConfigError where nothing is trainable, and for a rate of embeddings that have no adapters.
    """
    groups = parameter_groups(root, config, scales)
    if not groups:
        raise ConfigError("the model has no trainable parameter")
    if "loraplus_lr_embedding" in config.model_fields_set and not any(
            "lora_embedding_" in name for name, _ in root.named_parameters()):
        raise ConfigError("loraplus_lr_embedding is set, but the embeddings have no adapters", key="loraplus_lr_embedding",
                          hint="Name the embeddings in lora_target, or leave it out.")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.adam_beta1, config.adam_beta2),
                             eps=config.adam_epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """The rate of every group for the step to come."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["scale"]
