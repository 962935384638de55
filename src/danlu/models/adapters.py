"""Fine-tuning methods: all weights, or low-rank adapters (LoRA, arXiv:2106.09685, through peft)."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from danlu.core.config import Config
from danlu.core.errors import ConfigError, nearest
from danlu.models.attention import leave_packed


class AdapterConfig(Config):
    """Which weights are trained."""

    finetuning_type: Literal["full", "lora"] = Field("full", description="train every weight, or LoRA adapters only")
    lora_rank: int = Field(8, ge=1, description="rank of the adapters")
    lora_alpha: int | None = Field(None, ge=1, description="scale of the adapters; default: twice the rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    lora_target: str | list[str] = Field("all", description="names of linear layers, or `all` but the head")

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> "AdapterConfig":
        unread = sorted(name for name in self.model_fields_set if name.startswith("lora_"))
        if unread and self.finetuning_type != "lora":
            raise ValueError(f"{unread[0]} is read with finetuning_type: lora only")
        return self


def add_adapters(lm: PreTrainedModel, config: AdapterConfig, seed: int) -> nn.Module:
    """Puts fresh LoRA adapters into the model, in place, and freezes the rest. Returns peft's wrapper.

    The adapters start from a generator keyed by the seed. Raises ConfigError for a target that names no linear layer.
    """
    from peft import LoraConfig, get_peft_model

    linear = {name.rsplit(".", 1)[-1] for name, module in lm.named_modules() if type(module).__name__ in
              ("Linear", "Conv1D")}
    head = next((name.rsplit(".", 1)[-1] for name, module in lm.named_modules()
                 if module is lm.get_output_embeddings()), None)
    linear.discard(str(head))
    targets = sorted(linear) if config.lora_target == "all" else (
        [config.lora_target] if isinstance(config.lora_target, str) else list(config.lora_target))
    for target in targets:
        if target not in linear:
            close = nearest(target, linear)
            raise ConfigError(f"lora_target: “{target}” is no linear layer of {type(lm).__name__}",
                              hint=f"Did you mean {close}?" if close else f"It has: {', '.join(sorted(linear))}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(lm, LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha or 2 * config.lora_rank,
                                             lora_dropout=config.lora_dropout, target_modules=targets,
                                             task_type="CAUSAL_LM"))


@torch.no_grad()
def merge(adapted: nn.Module, lm: PreTrainedModel, probe_BT: Tensor) -> PreTrainedModel:
    """Merges the adapters into the weights and returns the plain model. Raises ConfigError where its logits differ.

    probe_BT: token ids on which base + adapter and the merged model are compared.
    """
    adapted.eval()
    leave_packed(lm)
    before = lm(input_ids=probe_BT, use_cache=False).logits.float()
    merged = adapted.merge_and_unload()  # type: ignore[operator]  # peft's, known as a Module
    after = merged(input_ids=probe_BT, use_cache=False).logits.float()
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-6))
    if not difference < 1e-3:
        raise ConfigError(f"merging the adapters changed the logits by {difference:.3g} of their size; not saved")
    return merged
