"""Encoders and encoder-decoders: the loss and every gradient are those of transformers' own `labels=`."""

from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoConfig,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    LlamaConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
)

from danlu.core.errors import ConfigError
from danlu.core.examples import ORIGINAL, SEGMENT, Branch, Example
from danlu.data.batch import Batch
from danlu.models.encoders import KINDS, PairRoot, check_reading, max_row, own_tokens
from danlu.models.load import new_config
from danlu.models.root import Root
from danlu.objectives.language import Language

V = 61
SMALL = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
         "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1,
         "sep_token_id": 2}
T5 = {"vocab_size": V, "d_model": 16, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24, "decoder_start_token_id": 0}
BART = {"vocab_size": V, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 40}
CONFIGS = {
    "bert": ("masked", BertConfig(**SMALL)), "roberta": ("masked", RobertaConfig(**{**SMALL, "pad_token_id": 3})),
    "distilbert": ("masked", DistilBertConfig(vocab_size=V, dim=16, n_layers=2, n_heads=2, hidden_dim=24)),
    "electra": ("masked", ElectraConfig(**SMALL, embedding_size=8)),
    "albert": ("masked", AlbertConfig(**SMALL, embedding_size=8)), "modernbert": ("masked", ModernBertConfig(**SMALL)),
    "t5": ("pair", T5Config(**T5)),
    "t5-untied": ("pair", T5Config(**T5, tie_word_embeddings=False, feed_forward_proj="gated-gelu")),
    "bart": ("pair", BartConfig(**BART)), "llama": ("causal", LlamaConfig(**SMALL)),
}


def make_root(name: str) -> Root:
    torch.manual_seed(0)
    kind, config = CONFIGS[name]
    lm = KINDS[kind].auto.from_config(deepcopy(config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        if name == "bart":
            lm.final_logits_bias.normal_()
    return KINDS[kind].root(lm.double())


def examples_for(name: str) -> list[Example]:
    rng = np.random.default_rng(1)
    kind, found = CONFIGS[name][0], []
    for length, target in ((9, 4), (5, 7), (12, 3)):
        ids, said = rng.integers(4, V, length), rng.integers(4, V, target)
        weights = (rng.random(length) < 0.5).astype(np.float32)
        weights[:2] = [0, 1]
        original = rng.integers(4, V, length)
        branch = {"masked": Branch(ids, weights, {ORIGINAL: original}), "causal": Branch(ids, weights),
                  "pair": Branch(said)}[kind]
        found.append(Example(ids if kind == "pair" else ids[:0], (branch,)))
    return found


def own_loss(root: Root, example: Example) -> tuple[torch.Tensor, int]:
    """transformers' mean loss of one example alone, and over how many tokens it is the mean."""
    [branch] = example.branches
    labels = torch.from_numpy(branch.columns.get(ORIGINAL, branch.tokens).astype(np.int64))
    labels[torch.from_numpy(branch.weights) == 0] = -100
    ids = torch.from_numpy((example.stem if len(example.stem) else branch.tokens).astype(np.int64))
    return root.lm(input_ids=ids[None], labels=labels[None]).loss, int((labels != -100).sum())


def gradients(root: Root) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in root.named_parameters() if parameter.grad is not None}


def test_every_masked_token_counts_even_the_first() -> None:
    ids = np.arange(5)
    example = Example(ids[:0], (Branch(ids, [1, 0, 0, 1, 0], {ORIGINAL: ids}),))
    assert example.num_targets == 2 and len(Batch.pad([example]).site_target_S) == 2
    plain = Example(ids[:0], (Branch(ids, [1, 0, 0, 1, 0]),))
    assert plain.num_targets == 1 and len(Batch.pad([plain]).site_target_S) == 1


@pytest.mark.parametrize("name", [name for name, (kind, *_) in CONFIGS.items() if kind != "causal"])
def test_rows_behind_the_last_token_are_no_fault(name: str) -> None:
    root = make_root(name)
    root.num_ids = V - 9
    check_reading(root)


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_transformers_own(name: str) -> None:
    root, examples, objective = make_root(name), examples_for(name), Language()
    losses = [own_loss(root, example) for example in examples]
    total = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    total.backward()
    expected = gradients(root)
    root.zero_grad()
    batch = root.batch(examples)
    assert objective.count(batch) == sum(count for _, count in losses)
    found = objective(root(batch, coefficients_S=objective.coefficients(batch)), batch).total / objective.count(batch)
    found.backward()
    assert float(found) == pytest.approx(float(total), rel=1e-6)
    for key, value in gradients(root).items():
        assert torch.allclose(value, expected[key], rtol=1e-5, atol=1e-7), key
    assert {key for key, value in expected.items() if value.abs().max() > 0} <= gradients(root).keys()


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_micro_batches_add_up(name: str) -> None:
    root, examples = make_root(name), examples_for(name)
    with torch.no_grad():
        together = root(root.batch(examples)).logprobs_S
        alone = torch.cat([root(root.batch([example])).logprobs_S for example in examples])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_branches_share_what_their_stem_is_encoded_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_root(name)
    stem, branches = np.arange(4, 12), (Branch([7, 8, 9, 2]), Branch([30, 2], [0.5, 0]), Branch([12]))
    together, apart = [Example(stem, branches)], [Example(stem, (branch,)) for branch in branches]
    with torch.no_grad():
        batch = root.batch(together)
        assert batch.input_ids_BT.shape == (1, 8) and batch.decoder_ids_RU.shape == (3, 4)
        assert batch.decoder_ids_RU[:, 0].tolist() == [root.start_id] * 3 and batch.num_sites == 6
        assert torch.allclose(root(batch).logprobs_S, root(root.batch(apart)).logprobs_S, atol=1e-6)
        assert batch.without_targets().num_sites == 0
        assert root.hidden(batch.without_targets()).shape == root.hidden(batch).shape


@pytest.mark.parametrize("name", [name for name, (kind, _) in CONFIGS.items() if kind != "causal"])
def test_a_head_that_is_read_otherwise_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_root(name)
    check_reading(root)
    if isinstance(root, PairRoot):
        object.__setattr__(root.shape, "scale", root.shape.scale * 1.3)
    else:
        root._transform = lambda lm, states: states * 1.3 + 0.1
        if name == "electra":
            root._transform = lambda lm, states: lm.generator_predictions(states) * 1.5
    if name == "albert":
        root._transform = lambda lm, states: lm.predictions.dense(states)
    with pytest.raises((ConfigError, RuntimeError)):
        check_reading(root)


def test_token_types_reach_the_model() -> None:
    root = make_root("bert")
    ids = np.arange(4, 14)
    types = np.repeat([0, 1], 5)
    example = Example([], (Branch(ids, np.ones(10), {ORIGINAL: ids, SEGMENT: types}),))
    shorter = Example([], (Branch(ids[:6], np.ones(6), {ORIGINAL: ids[:6], SEGMENT: types[:6]}),))
    batch = Batch.pad([example, shorter])
    assert batch.token_type_ids_BT.tolist() == [types.tolist(), [0] * 5 + [1] + [0] * 4]
    with torch.no_grad():
        expected = root.lm(torch.from_numpy(ids)[None], token_type_ids=torch.from_numpy(types)[None]).logits
        found = root(batch).logprobs_S[:10]
    assert torch.allclose(found, expected[0].log_softmax(-1)[torch.arange(10), ids], atol=1e-6)


def test_positions_that_padding_takes_are_not_counted_on() -> None:
    assert max_row(make_root("roberta").lm) == 40 - 3 - 1 and max_row(make_root("t5").lm) is None


def test_a_type_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="“llama” is no masked language model"):
        new_config({"model_type": "llama"}, None, 100, "masked")
    with pytest.raises(ConfigError, match="“bert” is no model of an encoder and a decoder"):
        new_config({"model_type": "bert"}, None, 100, "pair")


@pytest.mark.parametrize(("family", "start"), [
    ("t5", 0), ("mt5", 0), ("umt5", 0), ("bart", 2), ("mbart", 2), ("pegasus", 0)])
def test_with_what_a_new_decoder_begins(family, start):
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=2)
    assert own_tokens(AutoConfig.for_model(family).to_dict(), tokenizer)["decoder_start_token_id"] == start
