"""Rows for new tokens: what they begin as, that old ones stay to the bit, and that padding is never likely."""

import pytest
import torch
from small_models import make_root
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from danlu.core.errors import DataError
from danlu.models.embeddings import TOLERANCE, Fill, check_logits, logits_on, num_rows, resize

OLD, ROWS = 60, 80
SOURCES = [(3, 4), (5,), (7, 7, 9, 59)]


def model(tied: bool, dtype: torch.dtype = torch.float32, bias: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                         tie_word_embeddings=tied, initializer_range=0.3)
    lm = LlamaForCausalLM(config)
    if bias:
        lm.lm_head.bias = nn.Parameter(torch.randn(64))
    return lm.to(dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_a_new_row_is_the_mean_of_the_rows_that_spelled_it(tied):
    lm = model(tied)
    old = [lm.model.embed_tokens.weight.detach().clone(), lm.lm_head.weight.detach().clone()]
    resize(lm, Fill(OLD, SOURCES, OLD), ROWS)
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == tied
    assert lm.config.vocab_size == ROWS == lm.lm_head.out_features
    for before, after in zip(old, (lm.model.embed_tokens.weight, lm.lm_head.weight), strict=True):
        assert after.shape == (ROWS, 16)
        assert torch.equal(after[:OLD], before[:OLD])
        for number, ids in enumerate(SOURCES):
            expected = before.double()[list(ids)].mean(0)
            torch.testing.assert_close(after[OLD + number].double(), expected, atol=1e-6, rtol=0)
        assert torch.equal(after[63], before[63])  # an old row without token that no new one takes
        torch.testing.assert_close(after[64:].double(), before[:OLD].double().mean(0).expand(16, -1), atol=1e-6, rtol=0)


def test_a_bias_of_the_head_grows_too():
    lm = model(False, bias=True)
    before = lm.lm_head.bias.detach().clone()
    resize(lm, Fill(OLD, SOURCES, OLD), ROWS)
    assert lm.lm_head.bias.shape == (ROWS,) and torch.equal(lm.lm_head.bias[:OLD], before[:OLD])
    assert float(lm.lm_head.bias[OLD].detach()) == pytest.approx(float(before[[3, 4]].mean()), abs=1e-6)


def test_norms_and_random_rows():
    before = model(False).model.embed_tokens.weight.detach()
    lm = model(False)
    resize(lm, Fill(OLD, SOURCES, OLD, init="norm_matched"), ROWS)
    row, mean = lm.model.embed_tokens.weight[OLD].detach(), before[[3, 4]].mean(0)
    assert float(row.norm()) == pytest.approx(float(before[[3, 4]].norm(dim=-1).mean()), rel=1e-5)
    assert float(torch.cosine_similarity(row, mean, dim=0)) == pytest.approx(1, abs=1e-6)

    def drawn(seed: int) -> torch.Tensor:
        lm = model(False)
        resize(lm, Fill(OLD, [(1,)] * 4000, OLD, init="random", seed=seed), OLD + 4000)
        return torch.stack([lm.model.embed_tokens.weight[OLD:], lm.lm_head.weight[OLD:]]).detach()

    found = drawn(1)
    assert torch.equal(found, drawn(1)) and not torch.equal(found, drawn(2))
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0].mean(0), before[:OLD].mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(found[0].std(0), before[:OLD].std(0), atol=0.02, rtol=0.05)


def test_nothing_is_drawn_from_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    lm = model(True)
    torch.manual_seed(5)
    resize(lm, Fill(OLD, SOURCES, OLD, init="random"), ROWS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("init", ["mean", "norm_matched", "random"])
def test_a_replaced_vocabulary_takes_rows_from_anywhere(init):
    lm = model(True)
    before = lm.model.embed_tokens.weight.detach().clone()
    resize(lm, Fill(0, [(9,), (2, 3), (0,)], OLD, init), 8)
    after = lm.model.embed_tokens.weight
    assert torch.equal(after[0], before[9]) and torch.equal(after[2], before[0])
    assert torch.allclose(after[1], before[2:4].mean(0)) == (init == "mean")
    torch.testing.assert_close(after[3:], before[:OLD].mean(0).expand(5, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_precision_keeps_old_rows_to_the_bit(dtype):
    lm = model(False, dtype)
    with torch.no_grad():
        lm.lm_head.weight.normal_()  # numbers that float32 cannot hold, where the dtype has such
    before = lm.lm_head.weight.detach().clone()
    resize(lm, Fill(OLD, SOURCES, OLD), ROWS)
    assert lm.lm_head.weight.dtype == dtype and torch.equal(lm.lm_head.weight[:OLD], before[:OLD])
    assert torch.equal(lm.lm_head.weight[OLD], before[[3, 4]].float().mean(0).to(dtype))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2", "bloom"])
def test_old_logits_stay_and_new_ones_are_the_mean_of_their_parts(kind):
    lm = make_root(kind, torch.float32, probe=False).lm
    rows = [[1, 5, 9, 3], [7, 8]]
    before = logits_on(lm, rows, 97)
    resize(lm, Fill(97, SOURCES, 97), 128)
    assert check_logits(before, logits_on(lm, rows, 97)) <= 1e-5
    if kind != "gemma2":  # whose logits are capped
        new = logits_on(lm, rows, 128)[0][:, 97]
        torch.testing.assert_close(new, before[0][:, [3, 4]].mean(-1), atol=1e-4, rtol=1e-4)


def test_padding_rows_never_have_more_than_their_share():
    """GPT-2's logits are far below 0: rows of zeros would win everywhere."""
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2))
    with torch.no_grad():
        lm.transformer.ln_f.bias.fill_(3.0)
        lm.transformer.wte.weight.normal_(-1.0, 0.5)
    resize(lm, Fill(50, [], 50), 64)
    [logits_TV] = logits_on(lm, [[1, 2, 3, 4]], 64)
    assert float(logits_TV[:, :50].max()) < 0
    shares_TV = logits_TV.softmax(-1)
    assert bool((shares_TV[:, 50:] <= shares_TV[:, :50].sum(-1, keepdim=True) / 50 + 1e-6).all())


def test_the_check_of_logits_can_fail():
    before = [torch.tensor([[1.0, -4.0]])]
    assert check_logits(before, [torch.tensor([[1.0, -4.0 + 3 * TOLERANCE]])]) == pytest.approx(0.75 * TOLERANCE, rel=0.01)
    with pytest.raises(DataError, match="logits differ"):
        check_logits(before, [torch.tensor([[1.0, -4.0 + 5 * TOLERANCE]])])
    with pytest.raises(DataError, match="nan"):
        check_logits(before * 2, [before[0], torch.tensor([[1.0, float("nan")]])])


def test_numbers_of_rows():
    assert [num_rows(100, None), num_rows(100, 64), num_rows(128, 64)] == [100, 128, 128]
    assert num_rows(100, 64, at_least=150) == 192
