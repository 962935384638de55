"""Fine-tuning methods: all weights, or low-rank adapters (LoRA, arXiv:2106.09685, through peft)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from danlu.core.config import Config
from danlu.core.errors import ConfigError, nearest
from danlu.models.attention import leave_packed

TRAINED, FROZEN = "default", "reference"  # names of adapters


class AdapterConfig(Config):
    """Which weights are trained."""

    finetuning_type: Literal["full", "lora"] = Field("full", description="train every weight, or LoRA adapters only")
    lora_rank: int = Field(8, ge=1, description="rank of the adapters")
    lora_alpha: int | None = Field(None, ge=1, description="scale of the adapters; default: twice the rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    lora_target: str | list[str] = Field("all", description="names of linear layers, or `all` but the head")
    adapter_name_or_path: str | None = Field(
        None, description="a step that trained adapters of this model, or their folder: go on from them")

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> "AdapterConfig":
        unread = sorted(name for name in self.model_fields_set if name.startswith("lora_"))
        if unread and self.finetuning_type != "lora":
            raise ValueError(f"{unread[0]} is read with finetuning_type: lora only")
        if self.adapter_name_or_path is not None and self.finetuning_type != "lora":
            raise ValueError("adapter_name_or_path is read with finetuning_type: lora only")
        if self.adapter_name_or_path is not None and unread:
            raise ValueError(f"{unread[0]} is settled by the adapters in adapter_name_or_path")
        return self


def add_adapters(lm: PreTrainedModel, config: AdapterConfig, seed: int, *, adapter: Path | None = None,
                 head: str | None = None) -> nn.Module:
    """Puts LoRA adapters into the model, in place, and freezes the rest. Returns peft's wrapper.

    Fresh adapters start from a generator keyed by the seed; `adapter` is a folder of trained ones to go on from. `head`
    names a classifier's own head, which is trained whole. Raises ConfigError for a target that names no linear layer, and
    for adapters of another model.
    """
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model

    if adapter is not None:
        try:
            _check_kind(PeftConfig.from_pretrained(str(adapter)), adapter, head)
            return PeftModel.from_pretrained(lm, str(adapter), is_trainable=True)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ConfigError(f"these adapters do not fit the model: {str(error).splitlines()[0]}", where=str(adapter),
                              hint="Name the model that they were trained on.") from None
    linear = {name.rsplit(".", 1)[-1] for name, module in lm.named_modules() if type(module).__name__ in
              ("Linear", "Conv1D")}
    output = head or next((name for name, module in lm.named_modules() if module is lm.get_output_embeddings()), "")
    linear.discard(output.rsplit(".", 1)[-1])
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
                                             modules_to_save=None if head is None else [head],
                                             task_type="CAUSAL_LM" if head is None else "SEQ_CLS"))


def _check_kind(trained: Any, adapter: Path, head: str | None) -> None:
    """Raises ConfigError for adapters of a scorer under a language model, and for such as bring a scorer no head."""
    if head is None and trained.task_type == "SEQ_CLS":
        raise ConfigError("these adapters are those of a reward model", where=str(adapter),
                          hint="Name adapters of a language model.")
    if head is not None and head not in (trained.modules_to_save or ()):
        raise ConfigError("these adapters are those of a language model: they hold no head that scores", where=str(adapter),
                          hint="Name the step that trained them as `model`: there they are merged.")


def add_reference(adapted: Any, adapter: Path) -> None:
    """Loads trained adapters a second time, frozen, under the name `reference`."""
    adapted.load_adapter(str(adapter), FROZEN)
    adapted.set_adapter(TRAINED)  # peft up to 0.20 leaves them frozen, too


@contextmanager
def reference_adapter(adapted: Any, frozen: bool) -> Iterator[None]:
    """The model as it was before training: with the frozen adapters that `add_reference` loaded, or with none."""
    if not frozen:
        with adapted.disable_adapter():
            yield
        return
    adapted.set_adapter(FROZEN)
    try:
        yield
    finally:
        adapted.set_adapter(TRAINED)


def save_adapters(adapted: Any, folder: Path) -> None:
    """Writes the trained adapters as peft opens them."""
    adapted.save_pretrained(str(folder), selected_adapters=[TRAINED])
    (folder / "README.md").unlink(missing_ok=True)


@torch.no_grad()
def merge(adapted: Any, lm: PreTrainedModel, probe_BT: Tensor) -> PreTrainedModel:
    """Merges the adapters into the weights and returns the plain model. Raises ConfigError where its logits differ.

    probe_BT: token ids on which base + adapter and the merged model are compared.
    """
    adapted.eval()
    leave_packed(lm)
    before = lm(input_ids=probe_BT, use_cache=False).logits.float()
    merged = adapted.merge_and_unload()
    after = merged(input_ids=probe_BT, use_cache=False).logits.float()
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-6))
    if not difference < 1e-3:
        raise ConfigError(f"merging the adapters changed the logits by {difference:.3g} of their size; not saved")
    return merged
