"""Opening and saving models: from a folder, a hub id or from nothing; probed at loading, checked at saving.

At loading, the head is compared with the model's own logits, and packed trees with the same sequences alone, on that very
checkpoint. A model that packs wrongly falls back to one padded row per branch, and `notes` says so.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import logging as transformers_logging

from danlu.core.errors import ConfigError, DataError, nearest
from danlu.core.examples import Branch, Example
from danlu.models import attention
from danlu.models.adapters import AdapterConfig, add_adapters, merge
from danlu.models.root import Root, check_head

transformers_logging.disable_progress_bar()  # danlu has its own
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")


@dataclass(slots=True)
class Loaded:
    """A model ready to be called, and what was found out about it."""

    root: Root
    tokenizer: Any
    tokenizer_folder: str
    adapted: nn.Module | None = None  # peft's wrapper, where adapters are trained
    notes: list[str] = field(default_factory=list)

    @property
    def lm(self) -> PreTrainedModel:
        return self.root.lm


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or hub id. Raises ConfigError naming it where there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"no tokenizer could be opened: {str(error).splitlines()[0]}", where=str(source)) from None


def load_model(source: str | Path, *, tokenizer: str | Path | None = None, device: torch.device | str = "cpu",
               dtype: torch.dtype = torch.float32, adapters: AdapterConfig | None = None, seed: int = 0) -> Loaded:
    """Opens a checkpoint (folder or hub id) with its tokenizer, in `dtype`, probed; with adapters where asked."""
    try:
        lm = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"no causal language model could be opened: {str(error).splitlines()[0]}",
                          where=str(source)) from None
    return _ready(lm, str(tokenizer or source), device, adapters, seed)


def new_model(architecture: Mapping[str, Any], tokenizer: str | Path, *, device: torch.device | str = "cpu",
              dtype: torch.dtype = torch.float32, seed: int = 0) -> Loaded:
    """A model with random weights. `architecture` is `model_type` and that type's own config keys.

    Vocabulary size and special tokens come from the tokenizer. Raises ConfigError for an unknown type or key.
    """
    config = new_config(architecture, load_tokenizer(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return _ready(lm, str(tokenizer), device, None, seed)


def new_config(architecture: Mapping[str, Any], tokenizer: Any | None, vocab_size: int | None = None) -> Any:
    """The config of a model from nothing, made strict: a key that the model type does not have is refused.

    For a forecast the vocabulary's size is enough; a model to be trained takes its special tokens from a tokenizer.
    """
    keys = dict(architecture)
    model_type = keys.pop("model_type", "llama")
    try:
        known = AutoConfig.for_model(model_type).to_dict()
    except ValueError:
        raise ConfigError(f"“{model_type}” is no model type of transformers") from None
    foreign = sorted(set(keys) - set(known) - {"head_dim", "rope_theta", "rope_parameters"})
    if foreign:
        close = nearest(foreign[0], known)
        raise ConfigError(f"a {model_type} model has no setting “{foreign[0]}”",
                          hint=f"Did you mean {close}?" if close else None)
    if tokenizer is None:
        return AutoConfig.for_model(model_type, **{"vocab_size": vocab_size, **keys})
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
               "pad_token_id": tokenizer.pad_token_id}
    return AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **special, **keys})


def _ready(lm: PreTrainedModel, tokenizer_folder: str, device: torch.device | str, adapters: AdapterConfig | None,
           seed: int) -> Loaded:
    tokenizer = load_tokenizer(tokenizer_folder)
    rows = int(lm.get_input_embeddings().weight.size(0))  # type: ignore[operator]
    if len(tokenizer) > rows:
        raise ConfigError(f"the tokenizer has {len(tokenizer):,} entries, the model only {rows:,} rows for them",
                          where=tokenizer_folder, hint="Use the tokenizer that the model was trained with.")
    lm.to(device)  # type: ignore[arg-type]
    adapted = None
    if adapters is not None and adapters.finetuning_type == "lora":
        adapted = add_adapters(lm, adapters, seed)
    root = Root(lm)
    check_head(root)
    loaded = Loaded(root, tokenizer, tokenizer_folder, adapted)
    reason = why_not_packed(root)
    if reason:
        root.packs = False
        loaded.notes.append(f"{type(lm).__name__} cannot be packed ({reason}): one padded row per sequence is used")
    return loaded


@torch.no_grad()
def why_not_packed(root: Root) -> str | None:
    """None where this checkpoint gives the same hidden states packed as alone, else the reason; sets its attention."""
    lm, was = root.lm, root.training
    kind = (lm.config.to_dict().get("rope_parameters") or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        return f"its {kind} positions depend on the whole row"
    generator = torch.Generator().manual_seed(0)
    stem, one, two, other = (torch.randint(0, lm.config.vocab_size, (n,), generator=generator).numpy()
                             for n in (5, 4, 6, 7))
    examples = [Example(stem, (Branch(one), Branch(two))), Example(other[:0], (Branch(other),))]
    alone = [[*stem, *one], [*stem, *two], list(other)]
    root.eval()
    try:
        expected = [lm.base_model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False).last_hidden_state[0]
                    for ids in alone]
        lm.set_attn_implementation(attention.NAME)
        packed = root.hidden(root.batch(examples).to(lm.device))
    except attention.UnsupportedAttention as error:
        use_plain_attention(lm)
        return error.message
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        # other architectures take other arguments; whatever they refuse here, the padded form remains
        use_plain_attention(lm)
        return f"its forward pass refuses packed rows: {str(error).splitlines()[0]}"
    finally:
        root.train(was)
    difference = max(_distance(packed[:9], expected[0]), _distance(packed[9:15], expected[1][5:]),
                     _distance(packed[15:], expected[2]))
    if difference < 1e-4 or (lm.dtype != torch.float32 and difference < 3e-2):
        return None
    use_plain_attention(lm)
    return f"packed and alone differ by {difference:.2g}"


def use_plain_attention(lm: PreTrainedModel) -> None:
    """Back to torch's own attention, which takes masks instead of layouts; other kinds of models are left alone."""
    if lm.config._attn_implementation == attention.NAME:
        lm.set_attn_implementation("sdpa")


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-6))


def check_length(config: Any, cutoff_len: int) -> None:
    """Raises ConfigError where rows of `cutoff_len` tokens are longer than the model's positions."""
    limit = config.to_dict().get("max_position_embeddings") or config.to_dict().get("n_positions")
    if limit and cutoff_len > limit:
        raise ConfigError(f"cutoff_len is {cutoff_len}, but the model has positions for {limit} tokens only",
                          hint=f"Set cutoff_len to {limit} or less.")


def save_model(loaded: Loaded, folder: Path, stop_ids: list[int]) -> None:
    """Writes what `from_pretrained` opens: weights, config, tokenizer with its template, and the ids that end a turn.

    Adapters are merged after a comparison of logits, and kept in `adapter/` beside the merged model.
    """
    lm = loaded.lm
    with torch.no_grad():
        if loaded.adapted is not None:
            loaded.adapted.save_pretrained(str(folder / "adapter"))  # type: ignore[operator]
            (folder / "adapter" / "README.md").unlink(missing_ok=True)
            ids = loaded.tokenizer("danlu 丹炉: 1, 2, 3.", add_special_tokens=False)["input_ids"]
            lm = merge(loaded.adapted, lm, torch.tensor([ids], device=lm.device))
    tokenizer = loaded.tokenizer
    lm.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
                                            eos_token_id=stop_ids[0] if len(stop_ids) == 1 else stop_ids)
    lm.save_pretrained(str(folder))
    copy_tokenizer(loaded.tokenizer_folder, tokenizer, folder)


def copy_tokenizer(source: str, tokenizer: Any, folder: Path) -> None:
    """The tokenizer's files, byte for byte where they lie in a folder, and a check that the copy gives the same ids."""
    if Path(source).is_dir():
        for name in TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, folder / name)
    else:
        tokenizer.save_pretrained(str(folder))
    sample = "The 三国演义 has 120 chapters. 滚滚长江东逝水\n\tdef f(x): return x + 1  😀"
    again = load_tokenizer(folder)
    if again(sample)["input_ids"] != tokenizer(sample)["input_ids"] or again.chat_template != tokenizer.chat_template:
        raise DataError("the saved tokenizer does not give the ids of the original", where=str(folder))
