"""The language objective against transformers' own loss and the worked numbers."""

import math
from copy import deepcopy

import pytest
import torch
from small_models import VOCAB, make_root
from transformers import AutoModelForCausalLM

from danlu.core.examples import Branch, Example
from danlu.data.batch import Batch
from danlu.objectives.language import Language

OBJECTIVE = Language()


def mean_loss(root, examples: list[Example]) -> float:
    batch = root.batch(examples)
    reading = root(batch, coefficients_S=OBJECTIVE.coefficients(batch).double())
    return float(OBJECTIVE(reading, batch).total.detach()) / OBJECTIVE.count(batch)


def test_equals_transformers_causal_loss() -> None:
    root = make_root("llama")
    plain = AutoModelForCausalLM.from_config(deepcopy(root.lm.config), dtype=torch.float64, attn_implementation="eager")
    plain.load_state_dict(root.lm.state_dict())
    ids = torch.randint(0, VOCAB, (1, 17))
    labels = ids.clone()
    labels[0, 3:9] = -100
    weights = (labels[0] != -100).float().numpy()
    expected = plain(input_ids=ids, labels=labels).loss.item()
    assert mean_loss(root, [Example([], (Branch(ids[0].numpy(), weights),))]) == pytest.approx(expected, rel=1e-5)


def test_padding_is_neither_attended_nor_learned() -> None:
    """2 5 6 1 8 7 6 padded to ten: six targets; what stands in the padding does not matter."""
    row = Example([], (Branch([2, 5, 6, 1, 8, 7, 6]),))
    longer = Example([], (Branch(list(range(10, 20))),))
    batch = Batch.pad([row, longer])
    assert batch.site_target_S[:6].tolist() == [5, 6, 1, 8, 7, 6]
    assert int((batch.site_branch_S == 0).sum()) == 6 and batch.attention_mask_BT[0].tolist() == [1] * 7 + [0] * 3
    root = make_root("gpt2")
    root.lm.set_attn_implementation("sdpa")
    first = root(batch).logprobs_S[:6]
    batch.input_ids_BT[0, 7:] = 55
    assert torch.equal(first, root(batch).logprobs_S[:6])


def test_token_zero_is_a_token() -> None:
    batch = Batch.pack([Example([], (Branch([5, 0, 6]),))])
    assert batch.site_target_S.tolist() == [0, 6]


def test_bits_nats_and_perplexity_of_two_certain_targets() -> None:
    """p = 1/2 and 1/8: one and three bits, two bits on average, 1.386294 nats, perplexity 4."""
    logp = torch.tensor([0.5, 0.125], dtype=torch.float64).log()
    bits = -logp / math.log(2)
    assert bits.tolist() == pytest.approx([1.0, 3.0])
    batch = Batch.pack([Example([9], (Branch([1, 2]),), category="x")])

    class Reading:
        total, logprobs_S = -logp.sum(), logp

    loss = OBJECTIVE(Reading(), batch)
    mean = float(loss.total) / OBJECTIVE.count(batch)
    assert mean == pytest.approx(1.386294, abs=1e-6) and math.exp(mean) == pytest.approx(4.0)
    assert float(loss.metrics["loss/x"]) == pytest.approx(2 * 1.386294, abs=1e-5)
    assert float(loss.metrics["count/loss/x"]) == 2


def test_losses_are_told_apart_by_category() -> None:
    root = make_root("qwen3")
    zh = Example([], (Branch([1, 4, 5, 6]),), category="zh")
    en = Example([], (Branch([1, 7, 8]),), category="en")
    batch = root.batch([zh, en])
    metrics = OBJECTIVE(root(batch, coefficients_S=OBJECTIVE.coefficients(batch).double()), batch).metrics
    assert float(metrics["loss/zh"]) / 3 == pytest.approx(mean_loss(root, [zh]))
    assert float(metrics["loss/en"]) / 2 == pytest.approx(mean_loss(root, [en]))
    assert float(metrics["loss"]) == pytest.approx(float(metrics["loss/zh"] + metrics["loss/en"]))
