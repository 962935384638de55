"""Opening and saving models: from a folder, a hub id or from nothing; probed at loading, checked at saving.

At loading, the head is compared with the model's own logits, and packed trees with the same sequences alone, on that very
checkpoint. A model that packs wrongly falls back to one padded row per branch, and `notes` says so.
"""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers import logging as transformers_logging

from danlu.core.errors import ConfigError, DataError, nearest
from danlu.core.examples import Branch, Example
from danlu.models import attention
from danlu.models.adapters import TRAINED, AdapterConfig, choose_trained, merge, save_adapters
from danlu.models.encoders import KINDS, check_reading, own_tokens
from danlu.models.freeze import join_rows, split_at
from danlu.models.generate import evaluating, stop_ids_of
from danlu.models.neftune import add_noise
from danlu.models.quantize import is_quantised, merge_unquantised, opening_options, settle
from danlu.models.root import Root, Trunk, check_head
from danlu.models.sizes import SIZES, UNBUILT, config_of_size, skeleton
from danlu.tokens.codec import num_ids, vocabulary_of

transformers_logging.disable_progress_bar()  # danlu has its own
# What transformers raises for folders that hold something else, too little, or what a download cut off.
UNREADABLE = (OSError, ValueError, KeyError, SafetensorError, StrictDataclassError)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "chat_template.jinja", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")


R = TypeVar("R", bound=Trunk)


@dataclass(slots=True)
class Loaded(Generic[R]):
    """A model ready to be called, and what was found out about it."""

    root: R
    tokenizer: Any
    adapted: nn.Module | None = None  # peft's wrapper, where adapters are trained
    notes: list[str] = field(default_factory=list)
    base: str | None = None  # where the weights are as they were, if they are held quantised

    @property
    def lm(self) -> PreTrainedModel:
        return self.root.lm


def reason_of(error: Exception) -> str:
    """The telling line of somebody else's error: the last one where a heading stands first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if isinstance(error, StrictDataclassError) else lines[0]) if lines else type(error).__name__


def load_config(source: str | Path) -> Any:
    """The config of a folder or hub id. Raises ConfigError naming it where there is none that transformers opens."""
    try:
        return AutoConfig.from_pretrained(str(source))
    except UNREADABLE as error:
        raise ConfigError(f"no model could be opened: {reason_of(error)}", where=str(source)) from None


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or hub id. Raises ConfigError naming it where there is none."""
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except UNREADABLE as error:
        raise ConfigError(f"no tokenizer could be opened: {reason_of(error)}", where=str(source)) from None


def load_model(source: str | Path, *, tokenizer: Any | None = None, device: torch.device | str = "cpu",
               dtype: torch.dtype = torch.float32, adapters: AdapterConfig | None = None,
               adapter: Path | None = None, seed: int = 0, new_tokens: Sequence[str] = (), kind: str = "causal"
               ) -> Loaded[Root]:
    """Opens a checkpoint (folder or hub id) in `dtype`, probed; with adapters where asked.

    tokenizer   one that is open already; default: the checkpoint's own
    adapter     the folder of a trained adapter to go on from; default: a fresh one
    new_tokens  those that the tokenizer has more than the checkpoint: they get rows (`add_rows`)
    kind        `causal`, `masked` or `pair` (of an encoder and a decoder)
    """
    bits = None if adapters is None else adapters.quantization_bit
    options = opening_options(bits)
    try:
        opened: Any = KINDS[kind].auto.from_pretrained(str(source), dtype=dtype, output_loading_info=True, **options)
    except (*UNREADABLE, RuntimeError) as error:
        raise ConfigError(f"no {KINDS[kind].noun} could be opened: {reason_of(error)}", where=str(source)) from None
    lm, info = opened
    if any(name.endswith("ForSequenceClassification") for name in lm.config.architectures or ()):
        raise ConfigError("is a model that scores sequences, not a language model", where=str(source),
                          hint="Name the model that it was trained from; a reward model belongs under reward_model, judge.")
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConfigError(f"has no weights for {missing[0]}"
                          + (f" and {len(missing) - 1} more" if len(missing) > 1 else "") +
                          "; random ones would have taken their place", where=str(source),
                          hint="Is the download complete, and was the model saved with its head?")
    tokenizer = tokenizer or load_tokenizer(source)
    if options:
        refuse_new_rows(new_tokens)
        settle(lm)
    add_rows(lm, tokenizer, new_tokens)
    loaded = _ready(lm, tokenizer, lm.device if options else device, adapters, seed, adapter, kind)
    require_trained_rows(lm, tokenizer, new_tokens if adapters is not None else ())
    loaded.base = str(source) if options else None
    return loaded


def new_model(architecture: Mapping[str, Any], tokenizer: Any, *, device: torch.device | str = "cpu",
              dtype: torch.dtype = torch.float32, adapters: AdapterConfig | None = None, seed: int = 0,
              kind: str = "causal") -> Loaded[Root]:
    """A model with random weights. `architecture` is `model_type` and that type's own config keys.

    Vocabulary size and special tokens come from the tokenizer. Raises ConfigError for an unknown type or key.
    """
    config = new_config(architecture, tokenizer, kind=kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = KINDS[kind].auto.from_config(config, dtype=dtype)
    return _ready(lm, tokenizer, device, adapters, seed, kind=kind)


def new_config(architecture: Mapping[str, Any], tokenizer: Any | None, vocab_size: int | None = None,
               kind: str = "causal") -> Any:
    """The config of a model from nothing, made strict: a key that the model type does not have is refused.

    For a forecast the vocabulary's size is enough; a model to be trained takes its special tokens from a tokenizer.
    """
    keys = dict(architecture)
    model_type, wanted = keys.pop("model_type", "llama"), keys.pop("parameters", None)
    try:
        known = AutoConfig.for_model(model_type).to_dict()
    except (ValueError, TypeError):
        raise ConfigError(f"“{model_type}” is no model type of transformers", key="model.model_type") from None
    if model_type not in KINDS[kind].types:
        raise ConfigError(f"“{model_type}” is no {KINDS[kind].noun}", key="model.model_type")
    foreign = sorted(set(keys) - set(known) - {"head_dim", "rope_theta", "rope_parameters"})
    if foreign:
        close = nearest(foreign[0], known)
        raise ConfigError(f"a {model_type} model has no setting “{foreign[0]}”",
                          key=f"model.{foreign[0]}", hint=f"Did you mean {close}?" if close else None)
    low = next((name for name in keys if name in SIZES and isinstance(keys[name], int) and keys[name] < 1), None)
    if low is not None:
        raise ConfigError(f"{low} is {keys[low]}, and a model has one at least", key=f"model.{low}")
    own: dict[str, Any] = {"vocab_size": vocab_size, "pad_token_id": None}  # a family's own may lie beyond this vocabulary
    if tokenizer is not None:
        own = {"vocab_size": num_ids(tokenizer), "bos_token_id": tokenizer.bos_token_id,
               "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        own |= own_tokens(known, tokenizer) if kind == "pair" else {}
    try:
        config = (AutoConfig.for_model(model_type, **{**own, **keys}) if wanted is None else
                  config_of_size(model_type, wanted, kind, {**own, **keys}))
        skeleton(config, kind)  # some families look at their shape only when a model is made
    except UNBUILT as error:
        raise ConfigError(f"a {model_type} model cannot be built so: {reason_of(error)}", key="model") from None
    if own["vocab_size"] is not None and config.vocab_size < own["vocab_size"]:
        raise ConfigError(f"vocab_size is {config.vocab_size:,}, and the tokenizer has {own['vocab_size']:,} ids",
                          key="model.vocab_size", hint="Leave it out: it comes from the tokenizer.")
    return config


def _ready(lm: PreTrainedModel, tokenizer: Any, device: torch.device | str, adapters: AdapterConfig | None,
           seed: int, adapter: Path | None = None, kind: str = "causal") -> Loaded[Root]:
    check_vocabulary(lm.config, tokenizer)
    if lm.device != torch.device(device):
        lm.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its types
    adapted = None if adapters is None else choose_trained(lm, adapters, seed, adapter=adapter)
    root = KINDS[kind].root(lm)
    if isinstance(root, Root):
        root.num_ids = num_ids(tokenizer)  # rows that no token has count in no probability
    add_noise(root, None if adapters is None else adapters.neftune_noise_alpha)
    if kind != "causal":
        check_reading(root)
        return Loaded(root, tokenizer, adapted)
    check_head(root)
    return Loaded(root, tokenizer, adapted, pack_if_possible(root))


@torch.no_grad()
def add_rows(lm: PreTrainedModel, tokenizer: Any, new_tokens: Sequence[str]) -> None:
    """Gives tokens that were added to a tokenizer rows in the embeddings and in the head, in place.

    A new row is the mean of the n old ones, x = 1/n Σ x_i. By Jensen's inequality exp(h·x) ≤ 1/n Σ exp(h·x_i): k new tokens
    take at most k/(n + k) of the probability, so that a model begins by saying what it said (J. Hewitt, “Initializing New
    Word Embeddings for Pretrained Language Models”, 2021). Rows that a padded vocabulary holds ready are used first.
    """
    if not new_tokens:
        return
    first, rows = min(tokenizer.convert_tokens_to_ids(list(new_tokens))), lm.config.get_text_config().vocab_size
    if first > rows:
        check_vocabulary(lm.config, tokenizer)  # it was not this model's tokenizer even before
    if num_ids(tokenizer) > rows:
        with torch.random.fork_rng(devices=[]):
            lm.resize_token_embeddings(num_ids(tokenizer), mean_resizing=False)
    tables, output = [lm.get_input_embeddings().get_parameter("weight")], lm.get_output_embeddings()
    if isinstance(output, nn.Linear):
        tables += [table for table in output.parameters() if table is not tables[0]]
    for table in tables:
        table[first:num_ids(tokenizer)] = table[:first].mean(0, dtype=torch.float32).to(table.dtype)


def refuse_new_rows(new_tokens: Sequence[str]) -> None:
    """Raises ConfigError where a quantised model would get new tokens: the base that is opened for merging has no rows."""
    if new_tokens:
        raise ConfigError("a quantised model is not given new rows", key="quantization_bit",
                          hint="Add the tokens in a step before, which trains all weights or adapters beside exact ones.")


def require_trained_rows(lm: PreTrainedModel, tokenizer: Any, new_tokens: Sequence[str]) -> None:
    """Raises ConfigError where a new row of the embeddings or of the head would stay as it began."""
    if not new_tokens:
        return
    ids = tokenizer.convert_tokens_to_ids(list(new_tokens))
    first = min(ids)
    for module in (lm.get_input_embeddings(), lm.get_output_embeddings()):
        if module is not None and not trains_rows(module, ids):
            raise ConfigError("the rows of the new tokens would not be trained", key="add_special_tokens",
                              hint=f"Set train_rows_from: {first}, which trains them, or finetuning_type: full.")


def trains_rows(table: nn.Module, ids: Sequence[int]) -> bool:
    """Whether all of these rows of the embeddings, or of a head, are trained."""
    if not any(parameter.requires_grad for parameter in table.parameters()):
        return False
    parts = dict(table.named_children())
    if "token_adapter" in parts:  # peft's own rows
        return set(ids) <= set(vars(parts["token_adapter"])["token_indices"][TRAINED])
    return not parametrize.is_parametrized(table, "weight") or min(ids) >= split_at(table)


def pack_if_possible(root: Trunk) -> list[str]:
    """Switches the model to packed attention, or to padded rows; what there is to say about it."""
    reason = why_not_packed(root)
    if not reason:
        return []
    root.packs = False
    return [f"{type(root.lm).__name__} cannot be packed ({reason}): one padded row per sequence is used"]


@torch.no_grad()
def why_not_packed(root: Trunk) -> str | None:
    """None where this checkpoint gives the same hidden states packed as alone, else the reason; sets its attention."""
    lm = root.lm
    kind = (lm.config.to_dict().get("rope_parameters") or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        return f"its {kind} positions depend on the whole row"
    generator = torch.Generator().manual_seed(0)
    stem, one, two, other = (torch.randint(0, lm.config.vocab_size, (n,), generator=generator).numpy()
                             for n in (5, 4, 6, 7))
    examples = [Example(stem, (Branch(one), Branch(two))), Example(other[:0], (Branch(other),))]
    alone = [[*stem, *one], [*stem, *two], list(other)]
    try:
        with evaluating(root):
            expected = [lm.base_model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False)
                        .last_hidden_state[0] for ids in alone]
            lm.set_attn_implementation(attention.NAME)
            packed = root.hidden(root.batch(examples).to(lm.device))
    except attention.UnsupportedAttention as error:
        attention.leave_packed(lm)
        return error.message
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        # other architectures take other arguments; whatever they refuse here, the padded form remains
        attention.leave_packed(lm)
        return f"its forward pass refuses packed rows: {str(error).splitlines()[0]}"
    difference = max(_distance(packed[:9], expected[0]), _distance(packed[9:15], expected[1][5:]),
                     _distance(packed[15:], expected[2]))
    if difference < 1e-4 or ((lm.dtype != torch.float32 or is_quantised(lm)) and difference < 3e-2):
        return None
    attention.leave_packed(lm)
    return f"packed and alone differ by {difference:.2g}"


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max().clamp(min=1e-6))


def positions_of(config: Any) -> int | None:
    """How many positions a model has, where its config says so."""
    return config.to_dict().get("max_position_embeddings") or config.to_dict().get("n_positions") or None


def check_length(config: Any, cutoff_len: int, max_new_tokens: int = 0) -> None:
    """Raises ConfigError where rows of `cutoff_len` tokens (and an answer to them) are beyond the model's positions."""
    limit = positions_of(config)
    if limit and cutoff_len + max_new_tokens > limit:
        more = f" and max_new_tokens {max_new_tokens}" if max_new_tokens else ""
        raise ConfigError(f"cutoff_len is {cutoff_len}{more}, but the model has positions for {limit} tokens only",
                          key="cutoff_len", hint=f"Set cutoff_len to {limit - max_new_tokens} or less.")


def check_vocabulary(config: Any, tokenizer: Any) -> None:
    """Raises ConfigError where a tokenizer has ids that the model has no rows for."""
    rows = config.get_text_config().vocab_size
    if num_ids(tokenizer) > rows:
        raise ConfigError(f"the tokenizer's ids go up to {num_ids(tokenizer) - 1:,}; the model has {rows:,} rows only",
                          where=tokenizer.name_or_path, hint="Use the tokenizer that the model was trained with.")


def save_model(loaded: Loaded, folder: Path, stop_ids: list[int]) -> None:
    """Writes what `from_pretrained` opens: weights, config, tokenizer with its template, and the ids that end a turn.

    Adapters are merged after a comparison of logits, and kept in `adapter/` beside the merged model. Those of a quantised
    model are merged into the weights as they were before.
    """
    lm = loaded.lm
    join_rows(lm)
    with torch.no_grad():
        if loaded.adapted is not None:
            save_adapters(loaded.adapted, folder / "adapter")
            ids = loaded.tokenizer("danlu 丹炉: 1, 2, 3.", add_special_tokens=False)["input_ids"]
            probe_BT = torch.tensor([ids], device=lm.device)
            lm = merge(loaded.adapted, lm, probe_BT) if loaded.base is None else \
                merge_unquantised(AutoModelForCausalLM, loaded.base, folder / "adapter", probe_BT)
    write_model(lm, loaded.tokenizer, folder, stop_ids)


def write_model(lm: PreTrainedModel, tokenizer: Any, folder: Path, stop_ids: Sequence[int],
                max_shard_size: str | None = None) -> None:
    """Writes a plain model with its tokenizer, in files of at most `max_shard_size` (transformers' own default if None)."""
    if lm.can_generate():
        lm.generation_config = _generation_config(lm, tokenizer, stop_ids)
    options: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    lm.save_pretrained(str(folder), **options)
    copy_tokenizer(tokenizer, folder)


def _generation_config(lm: PreTrainedModel, tokenizer: Any, stop_ids: Sequence[int]) -> GenerationConfig:
    """The checkpoint's own, which stops at these ids too."""
    config = GenerationConfig() if lm.generation_config is None else copy.deepcopy(lm.generation_config)
    stops = sorted({*stop_ids, *stop_ids_of(lm)})
    config.eos_token_id = stops[0] if len(stops) == 1 else stops
    config.bos_token_id = tokenizer.bos_token_id if config.bos_token_id is None else config.bos_token_id
    config.pad_token_id = tokenizer.pad_token_id if config.pad_token_id is None else config.pad_token_id
    try:
        config.validate(strict=True)
    except ValueError:  # transformers opens what it then refuses to save; the ids are what must not be lost
        return GenerationConfig(bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id,
                                eos_token_id=config.eos_token_id, suppress_tokens=config.suppress_tokens)
    return config


def check_reopened(config: Any, tokenizer: Any) -> None:
    """Raises ConfigError where transformers would open a tokenizer with other ids beside a model of this type."""
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        try:
            copy_tokenizer(tokenizer, Path(folder))
        except DataError:
            raise ConfigError(f"transformers opens every tokenizer beside a {config.model_type} model as that family's own "
                              "kind, and this one would then give other ids", key="model.model_type",
                              hint="llama and qwen3 are opened with any tokenizer.") from None


def copy_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer's files, byte for byte where they lie in a folder, and a check that the copy gives the same ids."""
    source = tokenizer.name_or_path  # where it was opened
    if Path(source).is_dir():
        for name in TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, folder / name)
    else:
        tokenizer.save_pretrained(str(folder))
    sample = "The 三国演义 has 120 chapters. 滚滚长江东逝水\n\tdef f(x): return x + 1  😀"
    again = load_tokenizer(folder)
    if vocabulary_of(again) != vocabulary_of(tokenizer):  # the step has added tokens
        for name in TOKENIZER_FILES:
            (folder / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(str(folder))
        again = load_tokenizer(folder)
    if again.chat_template != tokenizer.chat_template and isinstance(tokenizer.chat_template, str):
        # The step has chosen another template; transformers reads this file before all others.
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="")
        again = load_tokenizer(folder)
    if again(sample)["input_ids"] != tokenizer(sample)["input_ids"] or again.chat_template != tokenizer.chat_template or \
            vocabulary_of(again) != vocabulary_of(tokenizer):
        raise DataError("the saved tokenizer does not give the ids of the original", where=str(folder))
