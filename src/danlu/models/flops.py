"""Forecasts from a model's config alone: parameters, arithmetic and memory, without building anything."""

from dataclasses import dataclass
from typing import Any

from danlu.models.adapters import AdapterConfig


@dataclass(frozen=True, slots=True)
class Size:
    """What the arithmetic of a decoder is made of; widths in numbers, not bytes."""

    layers: int
    width: int
    inner: int
    attention_width: int
    key_value_width: int
    vocab: int
    tied: bool

    @property
    def trunk_parameters(self) -> int:
        """Weights of the blocks."""
        attention = self.width * (2 * self.attention_width + 2 * self.key_value_width)
        return self.layers * (attention + 3 * self.width * self.inner + 2 * self.width)

    @property
    def parameters(self) -> int:
        """All weights; tied embeddings once."""
        return self.trunk_parameters + self.vocab * self.width * (1 if self.tied else 2) + self.width

    def trained_parameters(self, config: AdapterConfig) -> int:
        """Weights that the settings let a training change: all, those of some layers, or the adapters'.

        Adapters have r·(inputs + outputs) weights for each linear layer of the blocks. What named modules and targets hold
        is not known before the model is open: all of a layer is counted.
        """
        table = self.vocab * self.width * (1 if self.tied else 2)
        rows = 0 if config.train_rows_from is None else max(0, self.vocab - config.train_rows_from) * table // self.vocab
        if config.finetuning_type == "freeze":
            return abs(config.freeze_trainable_layers) * (self.trunk_parameters // self.layers) + rows
        if config.finetuning_type == "lora":
            sides = 4 * self.width + 2 * (self.attention_width + self.key_value_width) + 3 * (self.width + self.inner)
            return self.layers * config.lora_rank * sides
        return self.parameters if config.train_rows_from is None else self.parameters - table + rows

    def training_flops(self, num_tokens: float, num_sites: float, mean_length: float) -> float:
        """6·N·T for the trunk, 6·V·D for each site, 6·L·H·D·(length/2)·2 for causal attention."""
        attention = 6 * self.layers * self.attention_width * mean_length * num_tokens
        return 6 * self.trunk_parameters * num_tokens + 6 * self.vocab * self.width * num_sites + attention

    def training_bytes(self, micro_batch_tokens: int, trainable: float = 1.0) -> float:
        """Weights, gradients and AdamW's two averages in float32, the activations of a micro-batch and the head's
        workspace. Activations are counted as 4 bytes × (22 widths + 4 inner widths) per layer and token: 34 widths where
        the inner one is three times the outer, the usual estimate for a decoder (arXiv:2205.05198, section 4.1)."""
        weights = 4 * self.parameters * (1 + 3 * trainable)
        activations = 4.0 * micro_batch_tokens * self.layers * (22 * self.width + 4 * self.inner)
        return weights + activations + 4 * min(1 << 25, 512 * self.vocab)


def size_of(config: Any) -> Size:
    """The size of a decoder from its transformers config."""
    keys = config.to_dict()

    def first(*names: str, default: int = 0) -> int:
        return next((int(keys[name]) for name in names if keys.get(name)), default)

    width = first("hidden_size", "n_embd", "d_model")
    heads = first("num_attention_heads", "n_head", default=1)
    head_dim = first("head_dim", default=width // heads)
    return Size(layers=first("num_hidden_layers", "n_layer", "num_layers"), width=width,
                inner=first("intermediate_size", "n_inner", "ffn_dim", default=4 * width),
                attention_width=heads * head_dim, key_value_width=first("num_key_value_heads", default=heads) * head_dim,
                vocab=first("vocab_size"), tied=bool(keys.get("tie_word_embeddings", True)))
