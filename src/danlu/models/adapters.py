"""Fine-tuning methods: which weights are trained, and how adapters are added, referred to, saved and merged.

- full: every weight; freeze: some layers and modules (`freeze.py`); lora: low-rank adapters through peft.
- LoRA (arXiv:2106.09685): W + s·B·A with s = α/r; rsLoRA (arXiv:2312.03732): s = α/√r.
- DoRA (arXiv:2402.09353, equation 5): m·(W + s·B·A)/‖W + s·B·A‖, with a trained magnitude m for each output.
- PiSSA (arXiv:2404.02948): A and B begin as the largest singular vectors of W, and W as the rest, W − s·B₀·A₀. B₀ and A₀
  are kept as the frozen adapter `reference`, which is the model before training; saving writes [B, −B₀]·[A; A₀], a common
  adapter of twice the rank for the weights as they were.
- New rows of a grown vocabulary (`train_rows_from`) are trained beside adapters as peft's trainable tokens: they are saved
  with the adapter, and the rows before them are not in it.

    adapted = choose_trained(lm, config, seed)      # peft's wrapper, or None where no adapter is trained
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from danlu.core.errors import ConfigError, nearest
from danlu.models.attention import leave_packed
from danlu.models.freeze import FreezeConfig, first_row, freeze, listed, require_rows, split_rows

TRAINED, FROZEN = "default", "reference"  # names of adapters
# Linear layers by the names of their classes: torch's, GPT-2's, and those of bitsandbytes.
LINEAR = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")
# What is settled once adapters exist, and what is read wherever adapters are trained.
OF_LORA = {"lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_rslora", "use_dora", "pissa_init", "pissa_iter",
           "additional_target"}
SETTLED = OF_LORA | {"train_rows_from"}
WITH_LORA = OF_LORA | {"adapter_name_or_path", "quantization_bit", "loraplus_lr_ratio", "loraplus_lr_embedding"}
WITH_FREEZE = {"freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"}


class AdapterConfig(FreezeConfig):
    """Which weights are trained, and with what noise; names as in LLaMA-Factory."""

    finetuning_type: Literal["full", "freeze", "lora"] = Field(
        "full", description="train every weight, some layers and modules, or LoRA adapters only")
    lora_rank: int = Field(8, ge=1, description="rank of the adapters")
    lora_alpha: int | None = Field(None, ge=1, description="scale of the adapters; default: twice the rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the adapters")
    lora_target: str | list[str] = Field("all", description="names of linear layers, or `all` but the head")
    use_rslora: bool = Field(False, description="scale the adapters by alpha/√rank instead of alpha/rank")
    use_dora: bool = Field(False, description="train a magnitude for each output beside the adapters' direction (DoRA)")
    pissa_init: bool = Field(False, description="begin the adapters as the largest singular vectors of the weights (PiSSA)")
    pissa_iter: int = Field(16, ge=-1, description="pissa_init: iterations of the fast SVD; -1 takes the exact one")
    additional_target: str | list[str] | None = Field(
        None, description="modules trained whole beside the adapters and saved with them, e.g. embed_tokens, norm")
    quantization_bit: Literal[4, 8] | None = Field(
        None, description="hold the frozen weights in so many bits (QLoRA); needs bitsandbytes")
    neftune_noise_alpha: float | None = Field(
        None, gt=0, description="noise on the embeddings while training, of this size over √(tokens · width) (NEFTune)")
    adapter_name_or_path: str | None = Field(
        None, description="a step that trained adapters of this model, or their folder: go on from them")

    @model_validator(mode="after")
    def _adapters_are_trained(self) -> "AdapterConfig":
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        for names, kind in ((WITH_LORA, "lora"), (WITH_FREEZE, "freeze")):
            unread = sorted(given & names) if self.finetuning_type != kind else []
            if unread:
                raise ValueError(f"{unread[0]} is read with finetuning_type: {kind} only")
        settled = sorted(given & SETTLED) if self.adapter_name_or_path is not None else []
        if settled:
            raise ValueError(f"{settled[0]} is settled by the adapters in adapter_name_or_path")
        if "pissa_iter" in given and not self.pissa_init:
            raise ValueError("pissa_iter is read with pissa_init: true only")
        if self.pissa_init and self.use_dora:
            raise ValueError("pissa_init and use_dora cannot both be set: such adapters fit no unchanged base")
        if self.pissa_init and self.quantization_bit is not None:
            raise ValueError("pissa_init and quantization_bit cannot both be set: PiSSA changes the weights it begins from")
        return self


def choose_trained(lm: PreTrainedModel, config: AdapterConfig, seed: int, *, adapter: Path | None = None,
                   head: str | None = None) -> nn.Module | None:
    """Makes exactly the weights trainable that the settings name, in place. Returns peft's wrapper, None without adapters.

    adapter  a folder of trained adapters to go on from
    head     the name of a classifier's own head, which is always trained
    """
    if config.finetuning_type == "lora":
        return add_adapters(lm, config, seed, adapter=adapter, head=head)
    if config.finetuning_type == "freeze":
        freeze(lm, config, head)
    first = first_row(config, lm.config)
    if first is not None:
        split_rows(lm, first)
    return None


def unwrapped(module: nn.Module) -> nn.Module:
    """A layer of the model itself, where adapters train the whole of it or some of its rows."""
    parts = dict(module.named_children())
    return unwrapped(parts["token_adapter"].get_submodule("base_layer")) if "token_adapter" in parts else \
        parts.get("original_module", module)


def add_adapters(lm: PreTrainedModel, config: AdapterConfig, seed: int, *, adapter: Path | None = None,
                 head: str | None = None) -> nn.Module:
    """Puts LoRA adapters into the model, in place, and freezes the rest. Returns peft's wrapper.

    Fresh adapters start from a generator keyed by the seed; `adapter` is a folder of trained ones to go on from. `head`
    names a classifier's own head, which is trained whole. Raises ConfigError for a target that names no linear layer, and
    for adapters of another model.
    """
    from peft import LoraConfig, get_peft_model

    if adapter is not None:
        return open_adapters(lm, adapter, head)
    targets = _targets(lm, config, head)
    if config.pissa_init:
        _check_rank(lm, config.lora_rank, targets)
    whole, tied = _whole_modules(lm, config, targets)
    first = first_row(config, lm.config)
    rows = None if first is None else _rows(lm, first, [*whole, *targets])
    options: dict[str, Any] = {
        "r": config.lora_rank, "lora_alpha": config.lora_alpha or 2 * config.lora_rank, "lora_dropout": config.lora_dropout,
        "target_modules": targets, "modules_to_save": (whole + ([] if head is None else [head])) or None,
        "use_rslora": config.use_rslora, "use_dora": config.use_dora, "ensure_weight_tying": tied,
        "trainable_token_indices": rows,
        "task_type": _task(lm, head)}
    svd: Any = "pissa" if config.pissa_iter == -1 else f"pissa_niter_{config.pissa_iter}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(lm, LoraConfig(init_lora_weights=svd if config.pissa_init else True, **options))
    if config.pissa_init:
        add_reference(adapted)
    return adapted


def _task(lm: PreTrainedModel, head: str | None) -> str | None:
    """What peft calls such a model; it has no name for masked ones."""
    if head is not None:
        return "SEQ_CLS"
    if lm.config.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if lm.can_generate() else None


def open_adapters(lm: PreTrainedModel, adapter: Path, head: str | None = None) -> nn.Module:
    """Puts the trained adapters of a folder into the model, in place. Raises ConfigError for those of another model."""
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(adapter))
        _check_kind(config, adapter, head)
        _check_ids(config, lm, adapter)
        return PeftModel.from_pretrained(lm, str(adapter), is_trainable=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"these adapters do not fit the model: {str(error).splitlines()[0]}", where=str(adapter),
                          hint="Name the model that they were trained on.") from None


def _targets(lm: PreTrainedModel, config: AdapterConfig, head: str | None) -> list[str]:
    """The names of the layers that get adapters. Raises ConfigError for one that can have none."""
    embeddings = lm.get_input_embeddings()
    linear = {name.rsplit(".", 1)[-1] for name, module in lm.named_modules() if type(module).__name__ in LINEAR}
    output = head or next((name for name, module in lm.named_modules() if module is lm.get_output_embeddings()), "")
    linear.discard(output.rsplit(".", 1)[-1])
    if config.lora_target == "all":
        return sorted(linear)
    tied = lm.get_output_embeddings() is not None and lm.get_output_embeddings().weight is embeddings.weight
    known = linear | {name.rsplit(".", 1)[-1] for name, module in lm.named_modules() if module is embeddings and not tied}
    targets = listed(config.lora_target)
    for target in targets:
        if target not in known:
            close = nearest(target, known)
            raise ConfigError(f"lora_target: “{target}” is no linear layer of {type(lm).__name__}",
                              hint=f"Did you mean {close}?" if close else f"It has: {', '.join(sorted(known))}.")
    return targets


def _check_rank(lm: PreTrainedModel, rank: int, targets: list[str]) -> None:
    """Raises ConfigError where a layer has fewer singular vectors than PiSSA's rank."""
    for name, module in lm.named_modules():
        if name.rsplit(".", 1)[-1] in targets and type(module).__name__ in LINEAR:
            smaller = min(lm.get_parameter(f"{name}.weight").shape)
            if rank > smaller:
                raise ConfigError(f"lora_rank is {rank}, but “{name}” has {smaller} singular vectors only", key="lora_rank",
                                  hint=f"Set lora_rank to {smaller} or less, or leave pissa_init or this layer out.")


def _whole_modules(lm: PreTrainedModel, config: AdapterConfig, targets: list[str]) -> tuple[list[str], bool]:
    """The modules that are trained whole, and whether embeddings and head are among them and are one weight.

    They go by their full names: peft takes every module whose name ends so, for `norm` also `input_layernorm`.
    """
    wanted = [] if config.additional_target is None else listed(config.additional_target)
    names = {name: module for name, module in lm.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for target in wanted:
        meant = {name: module for name, module in names.items() if name == target or name.endswith(f".{target}")}
        found |= meant
        if not meant:
            known = {name.rsplit(".", 1)[-1] for name in names} - set("0123456789")
            close = nearest(target, known)
            raise ConfigError(f"additional_target: “{target}” is no module of {type(lm).__name__}", key="additional_target",
                              hint=f"Did you mean {close}?" if close else f"It has: {', '.join(sorted(known))}.")
        if any(name.rsplit(".", 1)[-1] in targets for module in meant.values() for name, _ in
               [(target, module), *module.named_modules()]):
            raise ConfigError(f"additional_target: “{target}” holds layers that have adapters", key="additional_target",
                              hint="Name a module that lora_target leaves out.")
    embeddings, output = lm.get_input_embeddings(), lm.get_output_embeddings()
    if output is None or output.weight is not embeddings.weight:
        return list(found), False
    both = [name for name, module in found.items() if module is embeddings or module is output]
    if not both:
        return list(found), False
    first = next(name for name, module in names.items() if module is embeddings)
    return [first, *(name for name in found if name not in both)], True


def _rows(lm: PreTrainedModel, first: int, taken: list[str]) -> dict[str, list[int]]:
    """The ids from `first` on, for the embeddings and for a head with a weight of its own, by their full names.

    Raises ConfigError where there are none, and where the settings train these tables otherwise.
    """
    rows = require_rows(lm, first)
    embeddings, output = lm.get_input_embeddings(), lm.get_output_embeddings()
    found = {name: module for name, module in lm.named_modules() if module is embeddings or module is output}
    if any(name in taken or name.rsplit(".", 1)[-1] in taken for name in found):
        raise ConfigError("train_rows_from trains new rows of embeddings and head, and another setting all rows",
                          key="train_rows_from", hint="Leave them out of lora_target and additional_target.")
    if isinstance(output, nn.Linear) and output.bias is not None:
        raise ConfigError(f"the head of {type(lm).__name__} has a bias, whose rows peft does not train",
                          key="train_rows_from", hint="Set finetuning_type to full or freeze.")
    tied = output is not None and output.weight is embeddings.weight
    return {name: list(range(first, rows)) for name, module in found.items() if module is embeddings or not tied}


def _check_kind(trained: Any, adapter: Path, head: str | None) -> None:
    """Raises ConfigError for adapters of a scorer under a language model, and for such as bring a scorer no head."""
    if head is None and trained.task_type == "SEQ_CLS":
        raise ConfigError("these adapters are those of a reward model or a classifier", where=str(adapter),
                          hint="Name adapters of a language model.")
    if head is not None and head not in (trained.modules_to_save or ()):
        raise ConfigError("these adapters are those of a language model: they hold no head that scores", where=str(adapter),
                          hint="Name the step that trained them as `model`: there they are merged.")


def _check_ids(trained: Any, lm: PreTrainedModel, adapter: Path) -> None:
    """Raises ConfigError for adapters with rows of tokens that the model has none for."""
    last, rows = max(_ids_in(trained), default=0), len(lm.get_input_embeddings().get_parameter("weight"))
    if last >= rows:
        raise ConfigError(f"these adapters hold rows of tokens up to number {last:,}; the model has {rows:,} rows only",
                          where=str(adapter), hint="They were trained with further tokens. In a step, add these with "
                          "add_special_tokens; elsewhere, name the model that the adapters were merged into.")


def add_reference(adapted: Any) -> None:
    """Keeps the adapters as they are now a second time, frozen, under the name `reference`."""
    from peft.utils import ModulesToSaveWrapper

    config = copy.deepcopy(adapted.peft_config[TRAINED])
    config.init_lora_weights, config.modules_to_tie = False, None
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the head that is tied below
        adapted.add_adapter(FROZEN, config)
    embeddings = adapted.get_base_model().get_input_embeddings()
    for module in adapted.modules():
        if isinstance(module, ModulesToSaveWrapper) and FROZEN not in module.modules_to_save:
            module.update(FROZEN, tied_module=embeddings.modules_to_save[FROZEN])  # peft ties a head the first time only
    parameters = {f"{name}.": parameter for name, parameter in adapted.named_parameters()}  # those of embeddings end so
    kept = {name: parameter for name, parameter in parameters.items() if f".{FROZEN}." in name}
    for name, parameter in kept.items():
        parameter.data.copy_(parameters[name.replace(f".{FROZEN}.", f".{TRAINED}.")].data)
    adapted.set_adapter(TRAINED)
    for parameter in kept.values():
        parameter.requires_grad_(False)


@contextmanager
def reference_adapter(adapted: Any) -> Iterator[None]:
    """The model as it was before training: with the adapters that `add_reference` froze where it has, else with none."""
    if FROZEN not in adapted.peft_config:
        with adapted.disable_adapter():
            yield
        return
    adapted.set_adapter(FROZEN)
    try:
        yield
    finally:
        adapted.set_adapter(TRAINED)


def save_adapters(adapted: Any, folder: Path) -> None:
    """Writes the trained adapters as peft opens them, for the base as it is on the disk."""
    if str(adapted.peft_config[TRAINED].init_lora_weights).startswith("pissa"):
        _save_difference(adapted, folder)
        return
    adapted.save_pretrained(str(folder), selected_adapters=[TRAINED], save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def _save_difference(adapted: Any, folder: Path) -> None:
    """Writes PiSSA's adapters less their first values, s·(B·A − B₀·A₀), as adapters of twice the rank."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    now, first = (get_peft_model_state_dict(adapted, adapter_name=name, save_embedding_layers=False)
                  for name in (TRAINED, FROZEN))
    tensors = {}
    for name, value in now.items():
        if name.endswith(("lora_A.weight", "lora_embedding_A")):
            value = torch.cat([value, first[name]])
        elif name.endswith(("lora_B.weight", "lora_embedding_B")):
            value = torch.cat([value, -first[name]], dim=1)
        tensors[name] = value.detach().cpu().clone().contiguous()
    config = copy.deepcopy(adapted.peft_config[TRAINED])
    config.init_lora_weights, config.inference_mode = True, True
    config.base_model_name_or_path = adapted.get_base_model().name_or_path or None
    config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # the scale stays what it was
    config.r *= 2
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def trained_rows(adapted: Any) -> set[int]:
    """The ids whose rows the adapters hold."""
    return _ids_in(adapted.peft_config[TRAINED])


def _ids_in(trained: Any) -> set[int]:
    """The ids whose rows adapters of that config hold."""
    told = vars(trained).get("trainable_token_indices") or []  # not every kind of adapters has them
    return {index for ids in (told.values() if isinstance(told, dict) else [told]) for index in ids}


@torch.no_grad()
def merge(adapted: Any, lm: PreTrainedModel, probe_BT: Tensor) -> PreTrainedModel:
    """Merges the adapters into the weights and returns the plain model. Raises ConfigError where its logits differ.

    probe_BT: token ids on which base + adapter and the merged model are compared; tokens whose rows were trained, the
    first and the last of them, stand before these.
    """
    adapted.eval()
    rows = sorted(trained_rows(adapted))
    if rows:
        new_B2 = torch.tensor([[rows[0], rows[-1]]] * len(probe_BT), device=probe_BT.device)
        probe_BT = torch.cat([new_B2, probe_BT], dim=1)
    leave_packed(lm)
    inputs = {"decoder_input_ids": probe_BT} if lm.config.is_encoder_decoder else {}
    before = lm(input_ids=probe_BT, use_cache=False, **inputs).logits.float()
    merged = adapted.merge_and_unload()
    after = merged(input_ids=probe_BT, use_cache=False, **inputs).logits.float()
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-6))
    if not difference < 1e-3:
        raise ConfigError(f"merging the adapters changed the logits by {difference:.3g} of their size; not saved")
    return merged
