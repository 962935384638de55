"""GGUF: one file with weights, config and tokenizer, as llama.cpp and what is built on it read them.

For models of the Llama and Qwen families with byte-level tokenizers. Two things are not as in a checkpoint of transformers:
Llama's query and key rows are permuted (each pair of a rotation stands side by side), and a head that shares the weight of
the embeddings is left out. How words are split is a name in the file, which has to be one that llama.cpp knows: it is found
by the pattern in the tokenizer. A tokenizer with another one is refused, because its tokens would silently be others.

    write_gguf(lm, tokenizer, Path("model.gguf"), "f16", name="my-model")
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from danlu.core.errors import ConfigError
from danlu.models.generate import stop_ids_of
from danlu.tokens.codec import backend_of
from danlu.tokens.train import SPLIT

HINT = "Export it with --format safetensors."
ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
TYPES = {"float32": "F32", "f16": "F16", "bf16": "BF16"}
FILE_TYPES = {"float32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
          r"\s*[\r\n]+|\s+(?!\S)|\s+")
# llama.cpp's names of ways to split words, by the pattern that tokenizer.json has.
PATTERNS = {_WORDS % "": "qwen2", _WORDS % "{1,3}": "llama-bpe", SPLIT: "qwen35"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens


def check_gguf(lm_config: Any, tokenizer: Any) -> None:
    """Raises ConfigError where a model or its tokenizer cannot be written as GGUF, or the package is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("writing GGUF needs the package gguf", hint="pip install 'danlu[gguf]', or --format safetensors.")
    keys = lm_config.to_dict()
    kind = keys["model_type"]
    if kind not in ARCHITECTURES:
        raise ConfigError(f"a {kind} model cannot be written as GGUF here: {', '.join(ARCHITECTURES)} can", hint=HINT)
    rope = (keys.get("rope_parameters") or {}).get("rope_type", "default")
    if rope != "default" or keys.get("use_sliding_window") or keys.get("mlp_bias"):
        raise ConfigError("its rotary positions, its sliding window or its biases are not written as GGUF here", hint=HINT)
    _split_name(_described(tokenizer))


def write_gguf(lm: PreTrainedModel, tokenizer: Any, path: Path, dtype: str, name: str) -> None:
    """Writes a model. `dtype` (float32, f16 or bf16) is that of matrices; vectors stay float32."""
    import gguf

    check_gguf(lm.config, tokenizer)
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[lm.config.model_type]]
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    _write_config(writer, lm.config)
    _write_tokenizer(writer, tokenizer, lm)
    names = gguf.get_tensor_name_map(architecture, lm.config.num_hidden_layers)
    shared = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    for own, value in lm.state_dict().items():
        if shared and own.startswith("lm_head."):
            continue
        found = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"GGUF has no name for the tensor {own}", hint=HINT)
        values = _permuted(own, value, lm.config).float().cpu().contiguous().numpy()
        kind = gguf.GGMLQuantizationType[TYPES[dtype] if values.ndim > 1 else "F32"]
        writer.add_tensor(found, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _permuted(name: str, value: Tensor, config: Any) -> Tensor:
    """Llama's query and key rows in GGUF's order: of each head (x₀ … x_k, y₀ … y_k) becomes (x₀, y₀, …, x_k, y_k)."""
    if config.model_type != "llama" or not (".q_proj." in name or ".k_proj." in name):
        return value
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    return value.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _write_config(writer: Any, config: Any) -> None:
    keys = config.to_dict()
    head_dim = keys.get("head_dim") or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(keys["rope_parameters"]["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _write_tokenizer(writer: Any, tokenizer: Any, lm: PreTrainedModel) -> None:
    described = _described(tokenizer)
    added = {item["id"]: item for item in described["added_tokens"]}
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    rows = lm.config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(described))
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(rows)])
    writer.add_token_types([UNUSED if index not in texts else NORMAL if index not in added else
                            CONTROL if added[index]["special"] else USER_DEFINED for index in range(rows)])
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]])
    ids_of = {writer.add_bos_token_id: tokenizer.bos_token_id, writer.add_eos_token_id: tokenizer.eos_token_id,
              writer.add_pad_token_id: tokenizer.pad_token_id, writer.add_unk_token_id: tokenizer.unk_token_id}
    for add, index in ids_of.items():
        if index is not None:
            add(index)
    turns = [index for index in stop_ids_of(lm) if index != tokenizer.eos_token_id]
    if turns:
        writer.add_eot_token_id(turns[0])
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def _described(tokenizer: Any) -> dict[str, Any]:
    return json.loads(backend_of(tokenizer).to_str())


def _split_name(described: dict[str, Any]) -> str:
    """llama.cpp's name of the way in which a byte-level tokenizer splits words. Raises ConfigError for any other."""
    outer = described["pre_tokenizer"] or {}
    steps = outer["pretokenizers"] if outer.get("type") == "Sequence" else [outer]
    kinds = [step.get("type") for step in steps]
    normalizer = (described["normalizer"] or {}).get("type")
    if described["model"]["type"] == "BPE" and normalizer in (None, "NFC") and kinds and kinds[-1] == "ByteLevel" and \
            not steps[-1]["add_prefix_space"]:
        by_itself = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and by_itself:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and by_itself:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not by_itself and steps[0]["behavior"] == "Isolated":
            found = PATTERNS.get(steps[0]["pattern"].get("Regex", ""))
            if found is not None:
                return found
    raise ConfigError("the tokenizer splits words in a way for which GGUF has no name that danlu knows", hint=HINT)


def read_tokenizer(path: Path) -> dict[str, Any]:
    """What a GGUF file says of its tokenizer: `tokens`, `merges`, and the ids and names by their keys."""
    import gguf

    fields = gguf.GGUFReader(str(path)).fields
    found: dict[str, Any] = {}
    for key, field in fields.items():
        if key.startswith("tokenizer."):
            found[key.removeprefix("tokenizer.").removeprefix("ggml.")] = field.contents()
    return found


def finite_in(lm: PreTrainedModel, dtype: str) -> bool:
    """Whether every weight can be written in that precision: f16 ends at 65,504."""
    limit = float(np.finfo(np.float16).max) if dtype == "f16" else float("inf")
    return all(bool(torch.isfinite(value).all()) and float(value.detach().abs().max()) <= limit
               for value in lm.parameters() if value.numel())
