"""Generation: the same tokens as transformers' own, exact log-probabilities, rows that do not know of each other."""

import numpy as np
import pytest
import torch
from small_models import CONFIGS, make_root
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from danlu.core.errors import DataError
from danlu.models import attention
from danlu.models.generate import Sampling, choose, generate, max_positions, stream, use_plain_attention

PAD, STOP = 0, 5
VOCABULARY = 61


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                         initializer_range=0.4, pad_token_id=PAD, bos_token_id=1, eos_token_id=STOP)
    return LlamaForCausalLM(config).eval()


def prompts(count: int = 9, longest: int = 20) -> list[list[int]]:
    generator = np.random.default_rng(3)
    # the pad token is among the prompts' tokens: padding must be told by length
    return [generator.integers(0, VOCABULARY, generator.integers(1, longest)).tolist() for _ in range(count)]


def full_logprobs(model: LlamaForCausalLM, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0].float()
    logprobs = torch.log_softmax(logits, -1)
    return logprobs[len(prompt) - 1:-1].gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_greedy_is_transformers_generate(model: LlamaForCausalLM, batch_size: int) -> None:
    answers = generate(model, prompts(), max_new_tokens=24, stop_ids=[STOP], pad_id=PAD, batch_size=batch_size)
    for prompt, answer in zip(prompts(), answers, strict=True):
        expected = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                                  max_new_tokens=24, do_sample=False, eos_token_id=STOP, pad_token_id=PAD)
        assert answer.tokens == expected[0, len(prompt):].tolist()
        assert answer.stopped == (answer.tokens[-1] == STOP)
        assert answer.answer == [token for token in answer.tokens if token != STOP]
    assert {answer.stopped for answer in answers} == {True, False}, "the test needs both kinds of end"


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.6])
def test_logprobs_are_those_of_a_full_forward(model: LlamaForCausalLM, temperature: float) -> None:
    answers = generate(model, prompts(), max_new_tokens=16, stop_ids=[STOP], pad_id=PAD, temperature=temperature,
                       top_k=20 if temperature else 0, top_p=0.9 if temperature else 1.0)
    for prompt, answer in zip(prompts(), answers, strict=True):
        expected = full_logprobs(model, prompt, answer.tokens)
        assert torch.allclose(torch.tensor(answer.logprobs), expected, atol=1e-5)


def test_other_architectures(model: LlamaForCausalLM) -> None:
    torch.manual_seed(1)
    other = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=48, n_embd=32, n_layer=2, n_head=2,
                                       initializer_range=0.4, bos_token_id=1, eos_token_id=STOP)).eval()
    assert max_positions(other) == 48
    for prompt, answer in zip(prompts(), generate(other, prompts(), max_new_tokens=8, stop_ids=[], pad_id=PAD),
                              strict=True):
        assert len(answer.tokens) == 8 and not answer.stopped
        assert torch.allclose(torch.tensor(answer.logprobs), full_logprobs(other, prompt, answer.tokens), atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_and_cache_are_right_for_every_kind(kind: str) -> None:
    other = make_root(kind, torch.float32).lm
    before = other.config._attn_implementation
    some = [[token % 90 for token in prompt] for prompt in prompts()]
    for prompt, answer in zip(some, generate(other, some, max_new_tokens=8, stop_ids=[7, 11], pad_id=PAD),
                              strict=True):
        with use_plain_attention(other):
            expected = full_logprobs(other, prompt, answer.tokens)
        assert torch.allclose(torch.tensor(answer.logprobs), expected, atol=2e-5)
    assert other.config._attn_implementation == before


def test_samples_depend_on_their_own_seed_alone(model: LlamaForCausalLM) -> None:
    def sample(some: list[list[int]], seeds: list[int], batch_size: int = 64) -> list[list[int]]:
        return [answer.tokens for answer in generate(model, some, max_new_tokens=12, stop_ids=[STOP], pad_id=PAD,
                                                     temperature=1.0, seeds=seeds, batch_size=batch_size)]

    every = prompts()
    seeds = list(range(100, 100 + len(every)))
    together = sample(every, seeds)
    assert sample(every, seeds, batch_size=2) == together
    assert sample(every[::-1], seeds[::-1])[::-1] == together
    for prompt, seed, tokens in zip(every, seeds, together, strict=True):
        assert sample([prompt], [seed]) == [tokens]
        streamed = list(stream(model, prompt, max_new_tokens=12, stop_ids=[STOP], temperature=1.0, seed=seed))
        assert streamed == [token for token in tokens if token != STOP]
    assert len({tuple(tokens) for tokens in sample([every[0]] * 8, list(range(8)))}) > 1


def test_one_seed_for_all_gives_each_its_own(model: LlamaForCausalLM) -> None:
    same = [prompts()[0]] * 6
    first, again = (generate(model, same, max_new_tokens=12, stop_ids=[], pad_id=PAD, temperature=1.0, seeds=7)
                    for _ in range(2))
    assert first == again
    assert len({tuple(answer.tokens) for answer in first}) == 6
    assert first != generate(model, same, max_new_tokens=12, stop_ids=[], pad_id=PAD, temperature=1.0, seeds=8)


def test_samples_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]]))
    drawn = (np.arange(1000) + 0.5) / 1000

    def shares(sampling: Sampling) -> list[float]:
        tokens = choose(logits.expand(1000, -1), sampling, drawn)
        return (torch.bincount(tokens, minlength=4) / 1000).tolist()

    assert shares(Sampling(1.0)) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.002)
    assert shares(Sampling(0.5)) == pytest.approx([p ** 2 / 0.345 for p in (0.5, 0.25, 0.15, 0.1)], abs=0.002)
    assert shares(Sampling(1.0, top_k=2)) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.002)
    assert shares(Sampling(1.0, top_p=0.5)) == pytest.approx([1, 0, 0, 0])
    assert shares(Sampling(1.0, top_p=0.6)) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.002)
    assert shares(Sampling(1.0, top_k=3, top_p=0.95)) == pytest.approx([5 / 9, 2.5 / 9, 1.5 / 9, 0], abs=0.002)
    assert shares(Sampling(0.0)) == [1, 0, 0, 0]
    ends = choose(logits.expand(2, -1), Sampling(1.0, top_k=2), np.array([0.0, np.nextafter(1.0, 0)]))
    assert ends.tolist() == [0, 1]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(model: LlamaForCausalLM, wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match="cannot be meant"):
        generate(model, [[1]], max_new_tokens=1, stop_ids=[], pad_id=PAD, **wrong)  # type: ignore[arg-type]


def test_lengths_are_checked_before_any_work(model: LlamaForCausalLM) -> None:
    with pytest.raises(DataError, match="60 prompt tokens and 5 new ones are more than the 64 positions"):
        generate(model, [[1], [1] * 60], max_new_tokens=5, stop_ids=[], pad_id=PAD)
    with pytest.raises(DataError, match="without tokens"):
        generate(model, [[]], max_new_tokens=5, stop_ids=[], pad_id=PAD)
    with pytest.raises(DataError, match="64 positions"):
        next(stream(model, [1] * 64, max_new_tokens=1, stop_ids=[]))
    assert len(generate(model, [[1] * 60], max_new_tokens=4, stop_ids=[], pad_id=PAD)[0].tokens) == 4
    assert generate(model, [], max_new_tokens=4, stop_ids=[], pad_id=PAD) == []


def test_model_is_left_as_it_was(model: LlamaForCausalLM) -> None:
    model.train()
    model.model.layers[0].eval()
    model.set_attn_implementation(attention.NAME)
    try:
        with use_plain_attention(model):
            assert model.config._attn_implementation == "sdpa"
        generate(model, prompts(2), max_new_tokens=3, stop_ids=[], pad_id=PAD)
        tokens = stream(model, [1, 2], max_new_tokens=20, stop_ids=[])
        next(tokens)
        assert not model.training and model.config._attn_implementation == "sdpa"
        assert torch.is_grad_enabled(), "nothing that the caller does between two tokens loses its gradient"
        tokens.close()  # type: ignore[attr-defined]
        assert model.training and not model.model.layers[0].training
        assert model.config._attn_implementation == attention.NAME
        model.set_attn_implementation("eager")
        with use_plain_attention(model):
            assert model.config._attn_implementation == "eager"
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.set_attn_implementation("sdpa")
        model.eval()
