"""Reward models and critics: opening, checking and saving a sequence classifier with one label.

A new head starts at zero, so that before training every answer scores 0 and a pair's loss is ln 2. The saved folder opens
as `AutoModelForSequenceClassification`. transformers looks for the last token that is not padding by its id, so a padding
id that also ends a turn would let it read the token before; the folder gets a padding token that never ends one.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers import logging as transformers_logging

from danlu.core.errors import ConfigError, DataError
from danlu.models.adapters import AdapterConfig, choose_trained, merge, save_adapters
from danlu.models.freeze import join_rows
from danlu.models.generate import evaluating
from danlu.models.load import (
    UNREADABLE,
    Loaded,
    check_vocabulary,
    copy_tokenizer,
    load_tokenizer,
    pack_if_possible,
    reason_of,
)
from danlu.models.neftune import add_noise
from danlu.models.root import ScoreRoot, scalar_head

PAD_FILES = ("tokenizer_config.json", "special_tokens_map.json")


def load_scorer(source: str | Path, *, tokenizer: Any | None = None, device: torch.device | str = "cpu",
                dtype: torch.dtype = torch.float32, new_head: bool = False, adapters: AdapterConfig | None = None,
                adapter: Path | None = None, seed: int = 0) -> Loaded[ScoreRoot]:
    """Opens a sequence classifier with one label, probed; with `new_head` also a language model, whose head becomes 0.

    Raises ConfigError where the folder holds no such model, or (without `new_head`) one without a scalar head.
    """
    if adapters is not None and adapters.quantization_bit is not None:
        raise ConfigError("a model that scores sequences is not trained quantised", key="quantization_bit")
    loud = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_error()  # that the head is new is what is wanted
        opened: Any = AutoModelForSequenceClassification.from_pretrained(str(source), num_labels=1, dtype=dtype,
                                                                         output_loading_info=True)
    except (*UNREADABLE, RuntimeError) as error:
        raise ConfigError(f"no model that scores sequences could be opened: {reason_of(error)}",
                          where=str(source)) from None
    finally:
        transformers_logging.set_verbosity(loud)
    lm, info = opened
    head = scalar_head(lm)
    missing = sorted(info["missing_keys"])
    other = [name for name in missing if not name.startswith(f"{head}.")]
    if other or (missing and not new_head):
        raise ConfigError(f"has no weights for {(other or missing)[0]}; random ones would have taken their place",
                          where=str(source), hint=None if other else "Is it a reward model (stage rm)?")
    if missing:
        nn.init.zeros_(lm.get_submodule(head).weight)
    tokenizer = tokenizer or load_tokenizer(source)
    check_vocabulary(lm.config, tokenizer)
    lm.to(device)
    root = ScoreRoot(lm)
    adapted = None
    if adapters is not None:
        adapted = choose_trained(lm, adapters, seed, adapter=adapter, head=head)
        add_noise(root, adapters.neftune_noise_alpha)
    loaded = Loaded(root, tokenizer, adapted)
    check_scores(root)
    loaded.notes += pack_if_possible(root)
    return loaded


@torch.no_grad()
def check_scores(root: ScoreRoot) -> None:
    """Compares the head with the model's own score of a few tokens. Raises ConfigError where they differ."""
    ids = torch.arange(1, 9, device=root.lm.device)[None] % root.lm.config.get_text_config().vocab_size
    with evaluating(root):
        expected = root.lm(input_ids=ids, use_cache=False).logits.float()
        hidden = root.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        own = root.lm.get_submodule(root.name_of_head)(hidden).float()
    # Which token a model reads depends on its padding id, which these ids may hold: one of them it must be.
    if not float((own - expected).abs().min()) < 1e-2 * max(1.0, float(expected.abs().max())):
        raise ConfigError(f"{type(root.lm).__name__} scores sequences in a way that danlu does not know",
                          hint="This model cannot be trained as a reward model here.")


def save_scorer(loaded: Loaded[ScoreRoot], folder: Path, stop_ids: list[int]) -> None:
    """Writes what `AutoModelForSequenceClassification.from_pretrained` opens, with its tokenizer.

    Adapters are merged after a comparison of scores, and kept in `adapter/` beside the merged model.
    """
    lm, tokenizer = loaded.lm, loaded.tokenizer
    join_rows(lm)
    with torch.no_grad():
        if loaded.adapted is not None:
            save_adapters(loaded.adapted, folder / "adapter")
            ids = tokenizer("danlu 丹炉: 1, 2, 3.", add_special_tokens=False)["input_ids"]
            lm = merge(loaded.adapted, lm, torch.tensor([ids], device=lm.device))
    pad = padding_token(tokenizer, stop_ids)
    lm.config.pad_token_id = tokenizer.convert_tokens_to_ids(pad)
    lm.save_pretrained(str(folder))
    copy_tokenizer(tokenizer, folder)
    if tokenizer.pad_token != pad:
        set_padding(folder, pad)


def padding_token(tokenizer: Any, stop_ids: list[int]) -> str:
    """A special token that never ends a turn: the tokenizer's own padding if it is one, else another that it has."""
    stops = {*stop_ids, tokenizer.eos_token_id}
    known = [tokenizer.pad_token, tokenizer.unk_token, *tokenizer.all_special_tokens, tokenizer.bos_token]
    for token in known:
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in stops:
            return str(token)
    raise ConfigError("every special token of the tokenizer ends a turn, so none can be the padding of a reward model",
                      where=tokenizer.name_or_path, hint="Give the tokenizer a pad token of its own.")


def set_padding(folder: Path, token: str) -> None:
    """Names the padding token in the files of a saved tokenizer, and checks that it is found there."""
    for name in PAD_FILES:
        path = folder / name
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(values | {"pad_token": token}, ensure_ascii=False, indent=2) + "\n",
                            encoding="utf-8")
    if load_tokenizer(folder).pad_token != token:
        raise DataError(f"the saved tokenizer does not take “{token}” as its padding", where=str(folder))
