"""Tiny random models of several types, and random trees, for the tests."""

from copy import deepcopy

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from danlu.core.examples import Branch, Example
from danlu.models.load import why_not_packed
from danlu.models.root import Root, check_head

VOCAB = 97
LLAMA_LIKE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2,
              "pad_token_id": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**LLAMA_LIKE, head_dim=8, tie_word_embeddings=False),
    "mistral-window": MistralConfig(**LLAMA_LIKE, sliding_window=4),
    "granite": GraniteConfig(**LLAMA_LIKE, logits_scaling=4.0),
    "cohere": CohereConfig(**LLAMA_LIKE),
    "gemma2": Gemma2Config(**LLAMA_LIKE, head_dim=8, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2,
                       resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
}


def exact_norms(lm: torch.nn.Module) -> None:
    """transformers computes its norms in float32 whatever the model's dtype, which would hide everything below 1e-8."""
    for parent in list(lm.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)


def make_root(kind: str, dtype: torch.dtype = torch.float64, *, probe: bool = True, seed: int = 0) -> Root:
    """A random model whose attention matters: weights larger than the usual initialisation."""
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(deepcopy(CONFIGS[kind]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    if dtype == torch.float64:
        exact_norms(lm)
    root = Root(lm.to(dtype))
    if probe:
        check_head(root)
        root.packs = why_not_packed(root) is None
    return root


def random_examples(seed: int, count: int, *, longest: int = 12, max_branches: int = 3) -> list[Example]:
    """Random trees: empty and long stems, several branches, ragged weights, and some with nothing to learn."""
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        stem = rng.integers(0, VOCAB, rng.integers(0, longest))
        branches = []
        for _ in range(rng.integers(1, max_branches + 1)):
            tokens = rng.integers(0, VOCAB, rng.integers(1, longest))
            weights = rng.choice([0.0, 0.0, 1.0, 1.0, 0.25, 2.5], len(tokens))
            if rng.random() < 0.2:
                weights[:] = 0.0
            branches.append(Branch(tokens, weights))
        examples.append(Example(stem, tuple(branches), "random", f"kind{number % 2}", str(number)))
    return examples
