"""Models of a given number of parameters, and the table of what a model's parameters are.

    model: {model_type: llama, parameters: 30M}

The shape follows one rule, for at a given size the shape hardly matters (Kaplan et al. 2020, arXiv:2001.08361, section
3.1): heads of 64 (of 32 below a width of 256), width ÷ layers as near as it can be to 32 (small models gain from depth:
MobileLLM, arXiv:2402.14905), inner width 8/3 of the width where the feed-forward part is gated, rounded up to a multiple
of 64, else 4 times. Embeddings and head are tied below `TIED_BELOW` parameters, above only where the family ties them by
itself. For every width the depth is taken that comes nearest to the number N, and of these shapes the one with the least
|log(width ÷ layers ÷ 32)| + 20·|N' ÷ N − 1|. An encoder and a decoder get equally many layers. Every setting that a recipe
names itself stays as it is.

Counting is exact: the model is built without memory (torch's meta device) and its parameters are added up.
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel

from danlu.core.errors import ConfigError
from danlu.models.encoders import KINDS

RATIO, CLOSENESS = 32, 20
TIED_BELOW = 1_000_000_000
# what transformers and torch say of an impossible shape
UNBUILT = (StrictDataclassError, ValueError, TypeError, AssertionError, ArithmeticError, LookupError, RuntimeError)
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
# How families call (width, layers, decoder's layers, heads, head width, key and value heads, inner widths); "": not at all
NAMES: Mapping[str, tuple[str, str, str, str, str, str, tuple[str, ...]]] = {
    "llama": ("hidden_size", "num_hidden_layers", "", "num_attention_heads", "head_dim", "num_key_value_heads",
              ("intermediate_size",)),
    "gpt2": ("n_embd", "n_layer", "", "n_head", "", "", ("n_inner",)),
    "bert": ("hidden_size", "num_hidden_layers", "", "num_attention_heads", "", "", ("intermediate_size",)),
    "t5": ("d_model", "num_layers", "num_decoder_layers", "num_heads", "d_kv", "", ("d_ff",)),
    "bart": ("d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "", "",
             ("encoder_ffn_dim", "decoder_ffn_dim")),
}
SIZES = {"vocab_size", *(name for *names, inner in NAMES.values() for name in (*names, *inner) if name)}
LIKE = {"llama": "llama", "qwen2": "llama", "qwen3": "llama", "mistral": "llama", "gpt2": "gpt2", "bert": "bert",
        "roberta": "bert", "modernbert": "bert", "t5": "t5", "mt5": "t5", "bart": "bart", "mbart": "bart"}
PARTS = (("embeddings", ("embed", "wte", "wpe", "shared")), ("attention", ("attn", "attention")),
         ("norms", ("norm", "ln_")), ("feed-forward", ("mlp", "fc1", "fc2", "dense", "ff")),
         ("head", ("lm_head", "cls", "head")))


def number_of(text: Any) -> int:
    """30M, 1.5B, 400K or a plain number. Raises ConfigError for anything else."""
    try:
        scale = UNITS.get(str(text)[-1:].upper(), 1)
        number = float(str(text)[:-1] if scale != 1 else text) * scale
    except (TypeError, ValueError):
        number = math.nan
    if not number >= 1 or math.isinf(number):
        raise ConfigError(f"“{text}” is no number of parameters", key="model.parameters", hint="Write 30M or 1.5B.")
    return round(number)


def config_of_size(model_type: str, wanted: Any, kind: str, keys: Mapping[str, Any]) -> Any:
    """The config of a model of about so many parameters, embeddings included.

    keys  settings that are given, among them `vocab_size`

    Raises ConfigError for a family whose shape is not known and where the vocabulary alone takes more, and one of UNBUILT
    where no width goes with the settings that are given.
    """
    target = number_of(wanted)
    if model_type not in LIKE:
        raise ConfigError(f"the shape of a {model_type} model of so many parameters is not known", key="model.parameters",
                          hint=f"Known: {', '.join(LIKE)}; of others name hidden_size, layers and the rest.")
    found: list[tuple[float, float, Any, int]] = []
    refused: Exception | None = None
    for width in _widths():
        try:
            one, two = (_count(model_type, width, layers, target, json.dumps(keys), kind) for layers in (1, 2))
        except UNBUILT as error:
            refused = refused or error  # the width does not go with a given number of heads, say
            continue
        each = two - one  # every layer has equally many; none where the depth is given
        layers = max(1, round((target - one) / each) + 1) if each else 1
        number = one + (layers - 1) * each
        config = _config(model_type, width, layers, target, keys)
        found.append((abs(math.log(width / layers / RATIO)) if each else 0.0, abs(number / target - 1), config, number))
        if one > 1.5 * target:
            break
    if not found:
        assert refused is not None, "there are widths"
        raise refused
    best = min(found, key=lambda item: item[0] + CLOSENESS * item[1])
    if best[1] > 0.5:
        raise ConfigError(f"no {model_type} of {target:,} parameters has this vocabulary: the smallest has {best[3]:,}",
                          key="model.parameters", hint="Take more parameters or a smaller vocab_size.")
    return best[2]


@lru_cache(maxsize=4096)
def _count(model_type: str, width: int, layers: int, target: int, keys: str, kind: str) -> int:
    return parameters_of(_config(model_type, width, layers, target, json.loads(keys)), kind)


def _widths() -> list[int]:
    return [*range(32, 256, 32), *range(256, 8193, 64)]


def _config(model_type: str, width: int, layers: int, target: int, keys: Mapping[str, Any]) -> Any:
    """A config of this width and depth by the rule; given settings go before it."""
    wide, deep, other, heads, head_dim, kv_heads, inner = NAMES[LIKE[model_type]]
    size = 32 if width < 256 else 64
    gated = LIKE[model_type] == "llama" or model_type in ("modernbert", "mt5")
    shape: dict[str, Any] = {wide: width, deep: layers, heads: width // size}
    shape |= {other: layers} if other else {}
    shape |= {head_dim: size} if head_dim else {}
    shape |= {kv_heads: width // size} if kv_heads else {}
    shape |= {"decoder_attention_heads": width // size} if LIKE[model_type] == "bart" else {}
    shape |= dict.fromkeys(inner, -(-8 * width // (3 * 64)) * 64 if gated else 4 * width)
    if target < TIED_BELOW:
        shape["tie_word_embeddings"] = True
    return AutoConfig.for_model(model_type, **{**shape, **keys})


def skeleton(config: Any, kind: str) -> PreTrainedModel:
    """The model without its weights. Raises one of UNBUILT for a shape that cannot be."""
    heads, shared = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and shared and heads % shared:  # a family's default may be more than the heads that are asked for
        raise ValueError(f"{heads} attention heads cannot share {shared} key and value heads: set num_key_value_heads to "
                         "what divides num_attention_heads")
    with torch.device("meta"):
        return KINDS[kind].auto.from_config(config)


def parameters_of(config: Any, kind: str) -> int:
    """How many parameters a model has; tied ones once."""
    return sum(parameter.numel() for parameter in skeleton(config, kind).parameters())


def shape_table(config: Any, kind: str) -> dict[str, str]:
    """What a model from nothing will be, for people: its shape, and its parameters by part."""
    lm = skeleton(config, kind)
    parts: dict[str, int] = {}
    for name, parameter in lm.named_parameters():
        lower = name.lower()
        part = next((part for part, marks in PARTS if any(mark in lower for mark in marks)), "other")
        parts[part] = parts.get(part, 0) + parameter.numel()
    keys = config.to_dict()

    def value(*names: str) -> str:
        return next((str(keys[name]) for name in names if keys.get(name)), "")

    inside, outside = lm.get_input_embeddings(), lm.get_output_embeddings()
    tied = outside is not None and vars(inside)["_parameters"]["weight"] is vars(outside)["_parameters"]["weight"]
    layers = value("encoder_layers", "num_hidden_layers", "n_layer", "num_layers")
    if config.is_encoder_decoder:
        layers += " + " + value("decoder_layers", "num_decoder_layers")
    shape = {"layers": layers, "width": value("hidden_size", "n_embd", "d_model"),
             "heads": value("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
             "feed-forward": value("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim"),
             "vocabulary": f"{config.vocab_size:,}" + (", tied" if tied else ", not tied")}
    total = sum(parts.values())
    return shape | {"parameters": f"{total:,} (" + ", ".join(
        f"{part} {number:,}" for part, number in sorted(parts.items(), key=lambda item: -item[1])) + ")"}
