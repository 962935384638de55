"""Roots for models that are no causal decoders: encoders with a masked head, and encoders with a decoder.

Both read padded rows. Of a masked model's head the part before the projection (BERT's transform, RoBERTa's dense layer …)
is computed for sites only, like the projection. Of an encoder-decoder every stem is encoded once, however many branches it
has; T5's scaling and BART's bias of the logits are taken along. What a model's head is made of is looked up by the names
that transformers gives its parts, and proved: `check_reading` compares with the model's own logits at loading.

    root = MaskedRoot(AutoModelForMaskedLM.from_pretrained(folder))
    root = PairRoot(AutoModelForSeq2SeqLM.from_pretrained(folder))

Legend: B rows, T positions in a row, R rows of a decoder, S sites, V vocabulary, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from danlu.core.errors import ConfigError
from danlu.core.examples import ORIGINAL, Branch, Example
from danlu.data.batch import Batch
from danlu.models.generate import evaluating
from danlu.models.root import ClassReading, ClassRoot, Root, projection

PROBE_LENGTHS = (5, 8)  # rows of two lengths, so that padding is tried, too


class MaskedRoot(Root):
    """An encoder whose head says what stood at masked places."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(lm, packs=False)
        self._transform = transform_of(lm)

    def before_head(self, site_SD: Tensor) -> Tensor:
        """The part of the head before its projection."""
        with torch.autocast(site_SD.device.type, self.autocast, enabled=self.autocast is not None):
            return self._transform(self.lm, site_SD)


class PairRoot(Root):
    """An encoder and a decoder: stems are encoded, branches decoded."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(lm, packs=False)
        start = lm.config.decoder_start_token_id
        if start is None:
            raise ConfigError(f"the config of this {type(lm).__name__} does not say with which token its decoder begins",
                              key="model", hint="Set decoder_start_token_id in its config.json.")
        self.start_id = int(start)
        if vars(lm.config).get("scale_decoder_outputs"):  # T5 with tied embeddings
            self.shape = replace(self.shape, scale=lm.config.d_model ** -0.5)

    def batch(self, examples: list) -> Batch:
        """Stems as the encoder's rows, branches as the decoder's."""
        return Batch.pair(examples, self.start_id)

    def hidden(self, batch: Batch) -> Tensor:
        """The decoder's last hidden states, [R·U, D]."""
        assert batch.decoder_ids_RU is not None and batch.decoder_example_R is not None
        assert batch.attention_mask_BT is not None
        with torch.autocast(batch.input_ids_BT.device.type, self.autocast, enabled=self.autocast is not None):
            states_BTD = self.lm.get_encoder()(input_ids=batch.input_ids_BT,
                                               attention_mask=batch.attention_mask_BT).last_hidden_state
            found = self.lm.get_decoder()(
                input_ids=batch.decoder_ids_RU, use_cache=False,
                encoder_hidden_states=states_BTD.index_select(0, batch.decoder_example_R),
                encoder_attention_mask=batch.attention_mask_BT.index_select(0, batch.decoder_example_R))
        return found.last_hidden_state.flatten(0, 1)

    def projection(self) -> tuple[Tensor, Tensor | None]:
        """The head's weight [V, D], and the bias [V] that BART adds to its logits."""
        weight_VD, bias_V = projection(self.lm)
        added = dict(self.lm.named_buffers()).get("final_logits_bias")
        return weight_VD, bias_V if added is None else added[0]


class EncoderClassRoot(ClassRoot):
    """An encoder that tells classes apart: of each padded row the logits that the model's own head gives."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__(lm, packs=False)

    def forward(self, batch: Batch, coefficients_S: Tensor | None = None) -> ClassReading:
        """Reads every row."""
        assert coefficients_S is None, "no coefficient is known before the logits are"
        inputs: dict[str, Any] = {"input_ids": batch.input_ids_BT, "attention_mask": batch.attention_mask_BT}
        if batch.token_type_ids_BT is not None and vars(self.lm.config).get("type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = batch.token_type_ids_BT
        with torch.autocast(batch.input_ids_BT.device.type, self.autocast, enabled=self.autocast is not None):
            return ClassReading(self.lm(**inputs).logits[:len(batch.end_index_N)])


def _nothing(lm: Any, site_SD: Tensor) -> Tensor:
    return site_SD


# The part of a masked head before its projection, by the name of a module that has it.
TRANSFORMS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "cls.predictions.transform": lambda lm, x: lm.cls.predictions.transform(x),  # BERT and its like
    "lm_head.layer_norm": lambda lm, x: lm.lm_head.layer_norm(gelu(lm.lm_head.dense(x))),  # RoBERTa, XLM-R, CamemBERT
    "vocab_layer_norm": lambda lm, x: lm.vocab_layer_norm(lm.activation(lm.vocab_transform(x))),  # DistilBERT
    "generator_predictions": lambda lm, x: lm.generator_predictions(x),  # ELECTRA
    "predictions.LayerNorm": lambda lm, x: lm.predictions.LayerNorm(lm.predictions.activation(lm.predictions.dense(x))),
    "head.norm": lambda lm, x: lm.head(x),  # ModernBERT
}


def transform_of(lm: PreTrainedModel) -> Callable[[Any, Tensor], Tensor]:
    """What a masked model does to hidden states before its projection; nothing where no known part is found."""
    names = {name for name, _ in lm.named_modules()}
    return next((found for name, found in TRANSFORMS.items() if name in names), _nothing)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of language model: how transformers opens it, which types there are, and the root that reads it."""

    noun: str
    auto: Any
    types: Mapping[str, Any]
    root: Callable[[PreTrainedModel], Root]


KINDS = {
    "causal": Kind("causal language model", AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, Root),
    "masked": Kind("masked language model", AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES, MaskedRoot),
    "pair": Kind("model of an encoder and a decoder", AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
                 PairRoot),
}


def own_tokens(config: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The special tokens that a new encoder-decoder's config names beside the usual ones: with what its decoder begins.

    That is what the family's default config says: padding where it names that or nothing (T5, Pegasus), else eos (BART).
    mBART's names nothing, for it begins with the mark of a language; a model of one language begins as BART does.
    """
    eos, begins = tokenizer.eos_token_id, config.get("decoder_start_token_id")
    by_padding = begins in (None, config.get("pad_token_id")) and config.get("model_type") != "mbart"
    start = tokenizer.pad_token_id if by_padding else eos
    if start is None:
        raise ConfigError("the tokenizer has no padding token, with which this model's decoder begins", key="tokenizer",
                          where=tokenizer.name_or_path, hint="Set pad_token in its tokenizer_config.json.")
    return {"decoder_start_token_id": start} | ({"forced_eos_token_id": eos} if config.get("forced_eos_token_id") else {})


def max_row(lm: PreTrainedModel) -> int | None:
    """The longest row that a model of absolute positions reads, where its padding takes some of them (RoBERTa)."""
    for module in lm.modules():
        table = vars(module).get("_modules", {}).get("position_embeddings")
        if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    return None


@torch.no_grad()
def check_reading(root: Root) -> None:
    """Compares what a root reads at its sites with the model's own logits on two rows. Raises ConfigError where they
    differ."""
    generator = np.random.default_rng(0)
    num_ids = root.num_ids or root.lm.config.get_text_config().vocab_size  # padded rows are no tokens
    rows = [generator.integers(0, num_ids, length) for length in PROBE_LENGTHS]
    if isinstance(root, PairRoot):
        examples = [Example(row, (Branch(row[::-1]), Branch(row[:3]))) for row in rows]
    else:
        examples = [Example(row[:0], (Branch(row, np.ones(len(row)), {ORIGINAL: row[::-1]}),)) for row in rows]
    with evaluating(root):
        batch = root.batch(examples).to(root.lm.device)
        own = root(batch).logprobs_S.float()
        found = []
        for example in examples:
            for branch in example.branches:
                ids = example.stem if len(example.stem) else branch.tokens
                inputs: dict[str, Any] = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None].to(root.lm.device)}
                if isinstance(root, PairRoot):
                    read = np.concatenate([[root.start_id], branch.tokens[:-1]])
                    inputs["decoder_input_ids"] = torch.from_numpy(read).to(root.lm.device)[None]
                target = torch.from_numpy(branch.columns.get(ORIGINAL, branch.tokens).astype(np.int64))[:, None]
                logits = root.lm(**inputs).logits[0, :, :num_ids].float().log_softmax(-1)
                found.append(logits.gather(1, target.to(logits.device))[:, 0])
    difference = float((own - torch.cat(found)).abs().max())
    if not difference < 1e-2:
        raise ConfigError(f"{type(root.lm).__name__} does something to its states or logits that danlu does not know: its "
                          f"own log-probabilities differ by {difference:.3g}", hint="This model cannot be trained here.")
