"""The promises about batches: how examples are packed, split or shared cannot change a loss or a gradient."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import VOCAB, make_root, random_examples

from danlu.core.examples import Branch, Example
from danlu.data.batch import Batch
from danlu.data.pack import micro_batches
from danlu.models.root import Root
from danlu.objectives.language import Language

OBJECTIVE = Language()
ROOTS = {kind: make_root(kind) for kind in ("llama", "qwen3")}


def loss_and_gradient(root: Root, groups: list[list[Example]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The step's loss and gradient with these micro-batches, divided once by the global count."""
    root.zero_grad()
    batches = [root.batch(group) for group in groups]
    count = sum(OBJECTIVE.count(batch) for batch in batches)
    loss = 0.0
    for batch in batches:
        total = OBJECTIVE(root(batch, coefficients_S=OBJECTIVE.coefficients(batch).double()), batch).total / count
        total.backward()
        loss += float(total.detach())
    return loss, {name: p.grad.clone() for name, p in root.named_parameters() if p.grad is not None}


def assert_same(left: tuple, right: tuple, tolerance: float = 1e-10) -> None:
    assert left[0] == pytest.approx(right[0], rel=tolerance)
    assert left[1].keys() == right[1].keys()
    for name, gradient in left[1].items():
        scale = gradient.abs().max().clamp(min=1e-12)
        assert float((gradient - right[1][name]).abs().max() / scale) < tolerance, name


def with_a_target(seed: int, count: int) -> list[Example]:
    examples = random_examples(seed, count)
    return [*examples, Example([3], (Branch([4, 5]),), "random", "kind0", "last")]


@pytest.mark.parametrize("kind", ROOTS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 7), budget=st.integers(1, 80))
def test_any_split_into_micro_batches_gives_one_result(kind: str, seed: int, count: int, budget: int) -> None:
    root, examples = ROOTS[kind], with_a_target(seed, count)
    assert_same(loss_and_gradient(root, micro_batches(examples, budget)), loss_and_gradient(root, [examples]))


@pytest.mark.parametrize("kind", ROOTS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5))
def test_packed_equals_alone_equals_padded(kind: str, seed: int, count: int) -> None:
    root, examples = ROOTS[kind], with_a_target(seed, count)
    packed = root(Batch.pack(examples)).logprobs_S
    alone = torch.cat([root(Batch.pack([example])).logprobs_S for example in examples])
    torch.testing.assert_close(packed, alone, rtol=1e-10, atol=1e-10)
    root.lm.set_attn_implementation("sdpa")
    padded = root(Batch.pad(examples)).logprobs_S
    root.lm.set_attn_implementation("danlu")
    torch.testing.assert_close(packed, padded, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ROOTS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_shared_stem_equals_separate_sequences(kind: str, seed: int) -> None:
    root, examples = ROOTS[kind], with_a_target(seed, 3)
    separate = [Example([], (Branch(np.concatenate([example.stem, branch.tokens]),
                                    np.concatenate([np.zeros(len(example.stem)), branch.weights])),))
                for example in examples for branch in example.branches]
    # an example without a stem begins with a token that nothing predicts, in both forms
    assert_same(loss_and_gradient(root, [examples]), loss_and_gradient(root, [separate]))


def test_one_document_changed_leaves_every_other_loss_bit_identical() -> None:
    root = make_root("llama", torch.float32)
    examples = random_examples(3, 6)
    before = Batch.pack(examples)
    changed = list(examples)
    victim = examples[2]
    changed[2] = Example((victim.stem + 1) % VOCAB, tuple(
        Branch((branch.tokens + 7) % VOCAB, branch.weights) for branch in victim.branches), id="changed")
    after = Batch.pack(changed)
    one, two = root(before).logprobs_S, root(after).logprobs_S
    owner = before.branch_example_N[before.site_branch_S]
    assert torch.equal(one[owner != 2], two[owner != 2])
    assert not torch.equal(one[owner == 2], two[owner == 2])


def test_one_branch_changed_leaves_its_sisters_bit_identical() -> None:
    root = make_root("qwen3", torch.float32)
    example = Example([5, 6, 7], (Branch([8, 9, 10]), Branch([11, 12, 13, 14])))
    other = Example([5, 6, 7], (Branch([8, 9, 10]), Branch([21, 22, 23, 24])))
    one, two = root(Batch.pack([example])).logprobs_S, root(Batch.pack([other])).logprobs_S
    assert torch.equal(one[:3], two[:3])
    assert not torch.equal(one[3:], two[3:])


def test_a_micro_batch_without_a_target_has_a_gradient_of_zeros_everywhere() -> None:
    root = ROOTS["llama"]
    root.zero_grad()
    batch = Batch.pack([Example([1, 2], (Branch([3, 4], [0, 0]),))])
    reading = root(batch, coefficients_S=OBJECTIVE.coefficients(batch).double())
    assert OBJECTIVE.count(batch) == 0
    reading.total.backward()
    assert all(p.grad is not None and not p.grad.any() for p in root.parameters())


def test_a_leaking_attention_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: one causal call over the whole row. The equivalence above must notice it."""
    from transformers import AttentionInterface

    from danlu.models import attention

    def leaking(module, query, key, value, attention_mask, scaling=None, dropout=0.0, layout=None, **_):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                                               enable_gqa=True)
        return out.transpose(1, 2), None

    root, examples = make_root("llama"), with_a_target(1, 3)
    alone = torch.cat([root(Batch.pack([example])).logprobs_S for example in examples])
    AttentionInterface.register(attention.NAME, leaking)
    try:
        leaked = root(Batch.pack(examples)).logprobs_S
    finally:
        AttentionInterface.register(attention.NAME, attention.packed_attention)
    assert float((leaked - alone).detach().abs().max()) > 1e-3
