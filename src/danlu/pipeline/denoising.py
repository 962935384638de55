"""What a pre-training step learns from running text: its settings, the special tokens it needs, its encoder and its noise.

    objective: causal            the next token; with fim_rate some pieces with their middle at the end
    objective: masked            the tokens behind masks (BERT)
    objective: span_corruption   the spans behind sentinels, said by a decoder (T5)
    objective: infilling         the whole text, said by a decoder, from one with masks and moved sentences (BART)
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from tokenizers import processors

from danlu.core.config import Config
from danlu.core.errors import ConfigError
from danlu.core.examples import Noise
from danlu.core.processes import num_cores
from danlu.pipeline.context import Input
from danlu.tokens.codec import vocabulary_of
from danlu.tokens.denoise import MASKS, FillInMiddle, Infilling, Masked, SpanCorruption, num_spans

if TYPE_CHECKING:
    from danlu.tokens.encode import Encoder
    from danlu.tokens.framed import FramedEncoder

SENTINEL = "<extra_id_{}>"
FIM_ROOM = 3  # tokens that mark the parts of a piece
# prefix, suffix and middle as families of code models write them; the last are made where none are there
FIM_TOKENS = (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
              ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"), ("<PRE>", "<SUF>", "<MID>"), ("▁<PRE>", "▁<SUF>", "▁<MID>"))
READ_BY = {"mlm_probability": "masked", "whole_word_mask": "masked", "noise_density": "span_corruption",
           "mean_span_length": "span_corruption", "mask_ratio": "infilling", "poisson_lambda": "infilling",
           "permute_sentences": "infilling", "delete_ratio": "infilling", "fim_rate": "causal", "fim_spm_rate": "causal"}
KIND_OF = {"causal": "causal", "masked": "masked", "span_corruption": "pair", "infilling": "pair"}


class DenoiseConfig(Config):
    """What is learned from a text, and how it is corrupted for that."""

    objective: Literal["causal", "masked", "span_corruption", "infilling"] = Field(
        "causal", description="causal: the next token; masked: BERT's; span_corruption: T5's; infilling: BART's")
    mlm_probability: float = Field(0.15, gt=0, le=1, description="masked: share of the tokens that are chosen")
    whole_word_mask: bool | Literal["jieba"] = Field(
        False, description="masked: choose whole words; jieba: with the words that jieba finds in Chinese text")
    noise_density: float = Field(0.15, gt=0, le=1, description="span_corruption: share of the tokens that are taken out")
    mean_span_length: float = Field(3.0, ge=1, description="span_corruption: mean length of the spans, in tokens")
    mask_ratio: float = Field(0.3, ge=0, le=1, description="infilling: share of the tokens behind masks")
    poisson_lambda: float = Field(3.0, ge=0.1, description="infilling: mean length of the spans, in tokens")
    permute_sentences: float = Field(1.0, ge=0, le=1, description="infilling: share of the sentences that change places")
    delete_ratio: float = Field(0.0, ge=0, lt=1, description="infilling: share of the tokens left that are deleted")
    fim_rate: float = Field(0.0, ge=0, le=1, description="causal: share of the pieces whose middle is moved to the end")
    fim_spm_rate: float = Field(0.5, ge=0, le=1, description="causal: share of these that begin with the suffix")

    @model_validator(mode="after")
    def _noise_is_read(self) -> "DenoiseConfig":
        for name in self.model_fields_set & READ_BY.keys():
            if READ_BY[name] != self.objective:
                raise ValueError(f"{name} is read with objective: {READ_BY[name]} only")
        if "fim_spm_rate" in self.model_fields_set and not self.fim_rate:
            raise ValueError("fim_spm_rate is read with a fim_rate only")
        return self

    @property
    def kind(self) -> str:
        """The kind of model that learns so, as `danlu.models.encoders` calls it."""
        return KIND_OF[self.objective]

    def stored(self) -> dict[str, Any]:
        """The settings that decide how documents are stored; all others act where they are drawn."""
        return {"objective": self.objective, "fim": self.fim_rate > 0, "whole_word_mask": self.whole_word_mask,
                "sentences": self.objective == "infilling" and self.permute_sentences > 0}

    def share_learned(self) -> float:
        """About how many of the stored tokens the head is computed for."""
        return {"masked": self.mlm_probability,
                "span_corruption": self.noise_density * (1 + 1 / self.mean_span_length)}.get(self.objective, 1.0)

    def shares_read(self) -> tuple[float, float]:
        """How many of the stored tokens an encoder and a decoder read, about; a single trunk counts as an encoder."""
        if self.objective == "span_corruption":
            return 1 - self.noise_density * (1 - 1 / self.mean_span_length), self.share_learned()
        if self.objective == "infilling":
            return (1 - self.mask_ratio * (1 - 1 / self.poisson_lambda)) * (1 - self.delete_ratio), 1.0
        return 1.0, 1.0


def check_objective(settings: Any, inputs: Mapping[str, Input]) -> None:
    """Raises ConfigError where the tokenizer has not the tokens, or the model's training not the form, of the objective."""
    from danlu.models.load import load_tokenizer
    from danlu.pipeline.stages.tokenizer import Settings as TokenizerSettings

    if settings.kind != "causal" and (settings.finetuning_type == "freeze" or settings.train_rows_from is not None
                                      or settings.neftune_noise_alpha or settings.quantization_bit):
        raise ConfigError(f"objective: {settings.objective} trains all weights, or adapters of weights as they are",
                          key="objective", hint="Leave finetuning_type: freeze, train_rows_from, neftune_noise_alpha and "
                          "quantization_bit out.")
    if settings.fim_rate and settings.cutoff_len < FIM_ROOM + 2:
        raise ConfigError(f"cutoff_len {settings.cutoff_len} leaves no room beside the three tokens of fim_rate",
                          key="cutoff_len", hint=f"Use {FIM_ROOM + 2} or more.")
    if settings.kind != "causal" and settings.sample_steps is not None:
        raise ConfigError(f"objective: {settings.objective} does not teach a model to go on with a text",
                          key="sample_steps", hint="Leave sample_steps out.")
    item = inputs[settings.tokenizer or settings.model]
    if item.folder is not None and item.produces in ("tokenizer", "model", "") and (item.folder / "tokenizer_config.json"
                                                                                   ).is_file():
        tokenizer = load_tokenizer(item.folder)
        special_tokens(settings, vocabulary_of(tokenizer), tokenizer.mask_token)
    elif isinstance(item.settings, TokenizerSettings):
        special_tokens(settings, item.settings.options().all_special, None)


def special_tokens(settings: DenoiseConfig, known: Collection[str], mask: str | None) -> list[str]:
    """The special tokens of an objective, in the order of their use, out of a vocabulary's. `mask` is the one it names.

    Raises ConfigError naming those that are missing.
    """
    if settings.objective == "causal":
        if not settings.fim_rate:
            return []
        found = next((tokens for tokens in FIM_TOKENS if set(tokens) <= set(known)), None)
        return list(found) if found else _missing(settings, FIM_TOKENS[0])
    if settings.objective == "span_corruption":
        count = num_spans(vars(settings)["cutoff_len"], settings.noise_density, settings.mean_span_length) + 1
        wanted = [SENTINEL.format(number) for number in range(count)]
        missing = [token for token in wanted if token not in known]
        return _missing(settings, missing) if missing else wanted
    masks = [token for token in (mask, *MASKS) if token is not None and token in known]
    return masks[:1] or _missing(settings, MASKS[:1])


def _missing(settings: DenoiseConfig, tokens: Collection[str]) -> list[str]:
    named = list(tokens)
    shown = ", ".join(f'"{token}"' for token in (named if len(named) < 5 else [*named[:2], "…", named[-1]]))
    key = f"special_tokens: [{shown}]"
    if settings.objective == "span_corruption":
        key = f"num_sentinels: {int(named[-1].removeprefix('<extra_id_').removesuffix('>')) + 1}"
    raise ConfigError(f"the tokenizer has no token {shown}, which objective: {settings.objective} writes", key="tokenizer",
                      hint=f"Add it in the tokenizer step: {key}")


def noise_of(settings: Any, tokenizer: Any) -> Noise | None:
    """What is done to an example where it is drawn; None where it is learned as it is stored."""
    vocabulary = vocabulary_of(tokenizer)
    ids = np.array([vocabulary[token] for token in special_tokens(settings, vocabulary, tokenizer.mask_token)], np.int32)
    if settings.objective == "masked":
        special = {*tokenizer.all_special_ids, int(ids[0]),
                   *(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)}
        ordinary = np.array(sorted(set(vocabulary.values()) - special), np.int32)
        return Masked(int(ids[0]), ordinary, settings.mlm_probability, bool(settings.whole_word_mask))
    if settings.objective == "span_corruption":
        return SpanCorruption(ids, settings.noise_density, settings.mean_span_length)
    if settings.objective == "infilling":
        return Infilling(int(ids[0]), settings.mask_ratio, settings.poisson_lambda, settings.permute_sentences,
                         settings.delete_ratio)
    if settings.fim_rate:
        prefix, suffix, middle = map(int, ids)
        return FillInMiddle(prefix, suffix, middle, tokenizer.eos_token_id, settings.fim_rate, settings.fim_spm_rate)
    return None


def document_encoder(settings: Any, tokenizer: Any) -> "Encoder | FramedEncoder":
    """What turns documents into stored examples for the objective."""
    from danlu.tokens.encode import Encoder
    from danlu.tokens.framed import FramedEncoder

    if settings.kind == "causal":
        room = settings.cutoff_len - (FIM_ROOM if settings.fim_rate else 0)
        encoder = Encoder(tokenizer, room, workers=settings.workers or num_cores())
        encoder.check(dialogues=False)
        return encoder
    words: Literal["own", "jieba"] | None = None
    if settings.whole_word_mask:
        words = "jieba" if settings.whole_word_mask == "jieba" else "own"
    return FramedEncoder(tokenizer, settings.cutoff_len, words=words, sentences=settings.stored()["sentences"],
                         workers=settings.workers or num_cores())


def shape_note(config: Any, kind: str) -> str:
    """A model from nothing in one line: its shape, and its parameters by part."""
    from danlu.models.sizes import shape_table

    table = shape_table(config, kind)
    return f"{config.model_type}: " + ", ".join(f"{name} {value}" for name, value in table.items() if value)


def check_target(config: Any, settings: Any) -> None:
    """Raises ConfigError where what span corruption takes out of a piece can be longer than the decoder's positions."""
    from danlu.models.load import positions_of

    limit = positions_of(config)
    if settings.objective != "span_corruption" or limit is None:
        return
    count = settings.cutoff_len
    longest = max(1, round(settings.noise_density * count)) + num_spans(count, settings.noise_density,
                                                                        settings.mean_span_length) + 2
    if longest > limit:
        raise ConfigError(f"a target may have {longest} tokens, and the model has positions for {limit} only",
                          key="noise_density", hint="Lower noise_density or cutoff_len, or raise mean_span_length.")


def check_rows(loaded: Any, cutoff_len: int) -> Any:
    """The loaded model. Raises ConfigError where its padding takes positions, and a row would be beyond the last."""
    from danlu.models.encoders import max_row

    limit = max_row(loaded.lm)
    if limit is not None and cutoff_len > limit:
        raise ConfigError(f"cutoff_len is {cutoff_len}, but the model has positions for {limit} tokens only",
                          key="cutoff_len", hint=f"Set cutoff_len to {limit} or less.")
    return loaded


def save_form(settings: Any, folder: Path) -> None:
    """Has a saved tokenizer frame texts as the model has read them, where it does not by itself."""
    from danlu.models.load import load_tokenizer
    from danlu.tokens.labelled import Form

    if settings.kind == "causal":
        return
    tokenizer = load_tokenizer(folder)
    form, backend = Form.of(tokenizer), tokenizer.backend_tokenizer
    if form.is_own:
        return
    special = {id: backend.id_to_token(id) for ids in form.two for id in ids}
    first, between, last = ([special[id] for id in ids] for ids in form.two)
    frame = processors.TemplateProcessing(single=[*first, "$A", *last], pair=[*first, "$A", *between, "$B:1", *last],
                                          special_tokens=[(token, id) for id, token in special.items()])
    before = backend.post_processor
    backend.post_processor = frame if before is None else processors.Sequence([before, frame])
    backend.save(str(folder / "tokenizer.json"))


def name_mask(settings: Any, folder: Path) -> None:
    """Names the mask in the files of a saved tokenizer, where it does not yet, so that `fill-mask` finds it."""
    from danlu.models.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if settings.objective not in ("masked", "infilling") or tokenizer.mask_token is not None:
        return
    [mask] = special_tokens(settings, vocabulary_of(tokenizer), None)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"mask_token": mask}
    path.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
