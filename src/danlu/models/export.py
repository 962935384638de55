"""A model as others open it: merged in float32, written in the precision that is asked for, opened again and compared.

The comparison is of logits on real text (English, Chinese, code, and a turn of the chat template): what was written is read
back by plain transformers, GGUF by its reader, and has to say what the model in memory says, up to the rounding of weights.

    lm, tokenizer = open_merged(Path("runs/quickstart/chat"), adapter=None)
    parity = write_checked(lm, tokenizer, Path("out"), "bf16", "safetensors", max_shard_size="5GB", name="chat")
"""

import copy
import io
import re
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from danlu.core.errors import ConfigError, DataError
from danlu.core.records import Message
from danlu.models.adapters import merge, open_adapters
from danlu.models.attention import leave_packed
from danlu.models.generate import max_positions
from danlu.models.gguf import check_gguf, finite_in, read_tokenizer, write_gguf
from danlu.models.load import load_model, write_model
from danlu.tokens.chat import Chat

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
GGUF_FILE = "model.gguf"
# The largest difference of logits, as a share of the largest logit, that rounding of weights may make.
TOLERANCES = {"float32": 1e-4, "f16": 1e-2, "bf16": 5e-2}
ROW = 256  # tokens that are compared at once
SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*(KB|MB|GB|KiB|MiB|GiB)")
# What a GGUF file has to say of a model; transformers reads no other keys of these families.
KEYS = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "rms_norm_eps", "vocab_size", "max_position_embeddings", "tie_word_embeddings")
TEXT = """\
It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. \
However little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so \
well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or other \
of their daughters.
话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。
def area(radius: float) -> float:
    return 3.14159 * radius ** 2  # 12 + 30 = 42
滚滚长江东逝水，浪花淘尽英雄。是非成败转头空。青山依旧在，几度夕阳红。
"""


@dataclass(frozen=True, slots=True)
class Parity:
    """What was written beside what was meant: the largest difference of logits as a share of the largest logit, the mean
    Kullback–Leibler divergence in nats for each token, and how many tokens were compared."""

    difference: float
    divergence: float
    num_tokens: int


def open_merged(source: Path, adapter: Path | None) -> tuple[PreTrainedModel, Any]:
    """A causal language model in float32 and its tokenizer, with the adapters of a folder merged in where one is given."""
    loaded = load_model(source)
    lm, tokenizer = loaded.lm, loaded.tokenizer
    leave_packed(lm)
    if adapter is not None:
        lm = merge(open_adapters(lm, adapter), lm, probe_rows(lm, tokenizer)[0])
    return lm.eval(), tokenizer


def probe_rows(lm: PreTrainedModel, tokenizer: Any) -> list[Tensor]:
    """Real text as token ids, in rows [1, T] that the model has positions for."""
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    width = min(ROW, max_positions(lm) or ROW)
    rows = [ids[start:start + width] for start in range(0, len(ids), width)]
    if tokenizer.chat_template is not None:
        rows.append(Chat(tokenizer).prompt_ids([Message("user", "How many chapters has 三国演义?")])[:width])
    return [torch.tensor([row]) for row in rows if row]


@torch.no_grad()
def write_checked(lm: PreTrainedModel, tokenizer: Any, folder: Path, dtype: str, form: str, *, max_shard_size: str | None,
                  name: str) -> Parity:
    """Writes the model into an empty folder, opens it again and compares.

    Raises ConfigError where the model cannot be written so, DataError where what was written says something else.
    """
    if not finite_in(lm, dtype):
        raise ConfigError(f"some weights are not finite in {dtype}", hint="Export it with --dtype bf16 or float32.")
    rows = probe_rows(lm, tokenizer)
    expected = [lm(input_ids=row, use_cache=False).logits[0] for row in rows]
    config = copy.deepcopy(lm.config)
    if form == "gguf":
        write_gguf(lm, tokenizer, folder / GGUF_FILE, dtype, name)
        _check_metadata(folder, config, tokenizer)
    else:
        lm.to(DTYPES[dtype])  # type: ignore[arg-type]  # transformers wraps `to` without its types
        write_model(lm, tokenizer, folder, (), max_shard_size)
    del lm
    # the width of a head in GGUF is no key that transformers reads, so the config is given; it was compared above
    options: dict[str, Any] = {"gguf_file": GGUF_FILE, "config": config} if form == "gguf" else {}
    with redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        opened = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **options).eval()
    parity = _compared(expected, [opened(input_ids=row, use_cache=False).logits[0] for row in rows])
    if not parity.difference < TOLERANCES[dtype]:
        raise DataError(f"what was written differs from the model by {parity.difference:.3g} of its largest logit, and "
                        f"rounding to {dtype} explains {TOLERANCES[dtype]:g} at most; nothing was exported")
    return parity


def _compared(expected: list[Tensor], found: list[Tensor]) -> Parity:
    largest = max(float(logits_TV.abs().max()) for logits_TV in expected)
    difference = max(float((a_TV - b_TV).abs().max()) for a_TV, b_TV in zip(expected, found, strict=True))
    divergences = []
    for a_TV, b_TV in zip(expected, found, strict=True):
        p_TV, q_TV = a_TV.double().log_softmax(-1), b_TV.double().log_softmax(-1)
        divergences.append((p_TV.exp() * (p_TV - q_TV)).sum(-1))
    each_T = torch.cat(divergences)
    return Parity(difference / max(largest, 1e-6), float(each_T.mean()), len(each_T))


def _check_metadata(folder: Path, config: Any, tokenizer: Any) -> None:
    """Raises DataError where a GGUF file's config or tokenizer is not the model's."""
    found = AutoConfig.from_pretrained(str(folder), gguf_file=GGUF_FILE)
    told, meant = found.to_dict(), config.to_dict()
    wrong = [key for key in KEYS if told.get(key) != meant.get(key) and
             not (isinstance(meant.get(key), float) and abs(told[key] - meant[key]) <= 1e-6 * abs(meant[key]))]
    theta = [float(each["rope_parameters"]["rope_theta"]) for each in (told, meant)]
    written = read_tokenizer(folder / GGUF_FILE)
    vocabulary = {text: index for index, text in enumerate(written["tokens"])}
    wrong += ["rope_theta"] if theta[0] != theta[1] else []
    wrong += ["tokens"] if any(vocabulary.get(text) != index for text, index in tokenizer.get_vocab().items()) else []
    wrong += [key for key, own in (("bos_token_id", tokenizer.bos_token_id), ("eos_token_id", tokenizer.eos_token_id),
                                   ("chat_template", written.get("chat_template"))) if written.get(key) != own]
    if wrong:
        raise DataError(f"the file says something else of “{wrong[0]}” than the model; nothing was exported")


def check_export(form: str, max_shard_size: str | None, config: Any, tokenizer: Any) -> None:
    """Raises ConfigError for what cannot be meant, before anything large is read."""
    if max_shard_size is not None and form == "gguf":
        raise ConfigError("--max-shard-size is of safetensors; a GGUF file is one")
    if max_shard_size is not None and not SHARD_SIZE.fullmatch(max_shard_size):
        raise ConfigError(f"--max-shard-size {max_shard_size} is no size", hint="Write it like 5GB or 500MB.")
    if form == "gguf":
        check_gguf(config, tokenizer)
