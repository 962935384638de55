"""Generation: the same tokens as transformers' own, exact log-probabilities, rows that do not know of each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from small_models import CONFIGS, make_root
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from danlu.core.errors import DataError
from danlu.core.examples import Branch, Example
from danlu.models import attention
from danlu.models.generate import ROOM, WIDTH, Completion, generate, max_positions, stream, use_plain_attention
from danlu.models.root import Root
from danlu.models.sampling import Sampling, choose, cut_off

PAD, STOP = 0, 5
VOCABULARY = 61


def llama(max_position_embeddings: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=max_position_embeddings,
                         initializer_range=0.4, pad_token_id=PAD, bos_token_id=1, eos_token_id=STOP)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama(64)


@pytest.fixture(scope="module")
def long_model() -> LlamaForCausalLM:
    return llama(256)


def prompts(count: int = 9, longest: int = 20) -> list[list[int]]:
    generator = np.random.default_rng(3)
    # the pad token is among the prompts' tokens: padding must be told by length
    return [generator.integers(0, VOCABULARY, generator.integers(1, longest)).tolist() for _ in range(count)]


def full_logprobs(model: PreTrainedModel, prompt: list[int], tokens: list[int], temperature: float = 1.0,
                  num_ids: int | None = None) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0].float()
    logprobs = torch.log_softmax(logits[:, :num_ids] / temperature, -1)
    return logprobs[len(prompt) - 1:-1].gather(1, torch.tensor(tokens)[:, None])[:, 0]


@contextmanager
def calls_of(model: PreTrainedModel) -> Iterator[list[dict[str, Any]]]:
    """The keywords of every call of the model."""
    calls: list[dict[str, Any]] = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def close(one: Completion, other: Completion) -> bool:
    return one.tokens == other.tokens and np.allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_greedy_is_transformers_generate_on_a_ragged_batch(kind: str) -> None:
    lm = make_root(kind, torch.float32, probe=False).lm
    width = max(map(len, prompts()))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts()])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts()])
    endless = generate(lm, prompts(), max_new_tokens=24, stop_ids=[], pad_id=PAD)
    stops = [endless[2].tokens[9], endless[5].tokens[3]]
    expected = lm.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=stops,
                           pad_token_id=PAD)
    answers = generate(lm, prompts(), max_new_tokens=24, stop_ids=stops, pad_id=PAD)
    for answer, row in zip(answers, expected[:, width:].tolist(), strict=True):
        assert answer.tokens == row[:len(answer.tokens)]
        assert answer.stopped or len(answer.tokens) == 24
    assert any(answer.stopped for answer in answers)
    assert len({token for answer in answers for token in answer.tokens}) > 10, "the test needs answers that differ"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0, 1.3])
def test_logprobs_are_those_of_a_full_forward(kind: str, temperature: float) -> None:
    root = make_root(kind, torch.float32)
    answers = generate(root.lm, prompts(), max_new_tokens=16, stop_ids=[STOP], pad_id=PAD, temperature=temperature,
                       top_k=20 if temperature else 0, top_p=0.9 if temperature else 1.0)
    for prompt, answer in zip(prompts(), answers, strict=True):
        with use_plain_attention(root.lm):
            expected = full_logprobs(root.lm, prompt, answer.tokens, temperature or 1.0)
        assert torch.allclose(torch.tensor(answer.logprobs), expected, rtol=0, atol=1e-5)
        if temperature in (0, 1):
            assert np.allclose(answer.logprobs, root_logprobs(root, prompt, answer.tokens), rtol=0, atol=1e-5)


@torch.no_grad()
def root_logprobs(root: Root, prompt: list[int], tokens: list[int]) -> list[float]:
    example = Example(np.array(prompt), (Branch(np.array(tokens)),))
    return root(root.batch([example])).logprobs_S.tolist()


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


def test_rows_with_a_state_leave_a_batch_too() -> None:
    torch.manual_seed(0)
    lm = Lfm2ForCausalLM(Lfm2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], initializer_range=0.4)).eval()

    def sample(some: list[list[int]], seeds: list[int]) -> list[Completion]:
        return generate(lm, some, max_new_tokens=12, stop_ids=range(0, VOCABULARY, 6), pad_id=PAD, temperature=1.0,
                        seeds=seeds)

    some = prompts() + prompts()[:4]
    together = sample(some, list(range(len(some))))
    assert len({len(answer.tokens) for answer in together}) > 3
    for seed, (prompt, answer) in enumerate(zip(some, together, strict=True)):
        assert close(sample([prompt], [seed])[0], answer)


def test_the_cache_grows_in_place(long_model: LlamaForCausalLM) -> None:
    some = prompts(40)
    with calls_of(long_model) as calls:
        places = []
        hook = long_model.register_forward_hook(
            lambda *_: places.append(calls[-1]["past_key_values"].layers[1].values.data_ptr()))
        answers = generate(long_model, some, max_new_tokens=3 * ROOM, stop_ids=[STOP], pad_id=PAD, temperature=1.0)
        hook.remove()
    lengths = sorted({len(answer.tokens) for answer in answers})
    assert len(lengths) > 4 and lengths[-1] > 2 * ROOM, "the test needs rows that leave, and growth"
    moves = sum(one != other for one, other in pairwise(places))
    assert moves <= len(lengths) + lengths[-1] // ROOM
    for prompt, answer in zip(some, answers, strict=True):
        expected = full_logprobs(long_model, prompt, answer.tokens)
        # float32 itself is that far from float64 after so many tokens of this model
        assert torch.allclose(torch.tensor(answer.logprobs), expected, rtol=0, atol=5e-5)


def test_equal_prompts_are_fed_once_in_a_batch(model: LlamaForCausalLM) -> None:
    one, two, three = [3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1], [2, 7, 1, 8, 2, 8, 3]
    some = [one, two, three, two, one, three, three, two, one, two, one, three]

    def sample(order: list[int], batch_size: int) -> tuple[list[list[int]], list[Completion]]:
        with calls_of(model) as calls:
            made = generate(model, [some[place] for place in order], max_new_tokens=6, stop_ids=[STOP], pad_id=PAD,
                            temperature=1.0, seeds=order, batch_size=batch_size)
        fed = [call for call in calls if call["input_ids"].shape[1] > 1]
        seen = [call["input_ids"].numel() if call["attention_mask"] is None else int(call["attention_mask"].sum())
                for call in fed]
        return [[len(call["input_ids"]) for call in fed], seen], made

    alone = [sample([place], 1)[1][0] for place in range(len(some))]
    assert len({tuple(answer.tokens) for answer in alone}) > 6
    for batch_size, rows, seen in [(12, [3], [19]), (4, [1, 1, 1], [5, 7, 7]), (8, [2, 1], [12, 7]),
                                   (5, [2, 2, 1], [12, 14, 7])]:
        for order in (list(range(12)), list(range(12))[::-1], [7, 2, 4, 9, 0, 11, 5, 3, 1, 8, 6, 10]):
            found, made = sample(order, batch_size)
            assert found == [rows, seen]
            assert all(close(alone[place], answer) for place, answer in zip(order, made, strict=True))


def test_padding_is_never_attended(model: LlamaForCausalLM) -> None:
    some = [*prompts(), [PAD], [PAD, PAD, 7, PAD], [7, PAD]]

    def sample(some: list[list[int]], seeds: list[int], pad_id: int) -> list[Completion]:
        return generate(model, some, max_new_tokens=8, stop_ids=[STOP], pad_id=pad_id, temperature=1.0, seeds=seeds)

    together = sample(some, list(range(len(some))), PAD)
    for seed, (prompt, answer) in enumerate(zip(some, together, strict=True)):
        assert close(sample([prompt], [seed], PAD)[0], answer)
    for pad_id in (7, VOCABULARY - 1):
        assert sample(some, list(range(len(some))), pad_id) == together


def test_without_padding_there_is_no_mask(model: LlamaForCausalLM) -> None:
    with calls_of(model) as calls:
        generate(model, [[1, 2, 3], [4, 5, 6]], max_new_tokens=3, stop_ids=[], pad_id=PAD)
    assert [call["attention_mask"] for call in calls] == [None] * 3
    with calls_of(model) as calls:
        generate(model, [[1, 2, 3], [4, 5]], max_new_tokens=3, stop_ids=[], pad_id=PAD)
    assert [call["attention_mask"].tolist() for call in calls] == [[[0, *[1] * (2 + n)], [1] * (3 + n)] for n in range(3)]


@pytest.mark.parametrize("cut", [{}, {"top_k": 50}, {"top_p": 0.99}])
def test_ids_beyond_the_tokenizer_do_not_exist(model: LlamaForCausalLM, cut: dict[str, float]) -> None:
    num_ids = VOCABULARY - 9
    options: dict[str, Any] = {"max_new_tokens": 40, "stop_ids": [], "pad_id": PAD, "temperature": 5.0, **cut}
    some = [prompts()[0]] * 250
    answers = generate(model, some, num_ids=num_ids, batch_size=250, **options)
    tokens = [token for answer in answers for token in answer.tokens]
    assert len(tokens) == 10_000 and max(tokens) == num_ids - 1
    expected = full_logprobs(model, some[0], answers[0].tokens, 5.0, num_ids)
    assert torch.allclose(torch.tensor(answers[0].logprobs), expected, rtol=0, atol=1e-5)
    assert any(max(answer.tokens) >= num_ids for answer in generate(model, some[:20], **options))
    first = list(stream(model, some[0], max_new_tokens=40, stop_ids=[], temperature=5.0, num_ids=num_ids, seed=3, **cut))
    assert [first] == [answer.tokens for answer in generate(model, some[:1], num_ids=num_ids, seeds=[3], **options)]
    assert generate(model, some[:1], num_ids=VOCABULARY + 7, **options) == generate(model, some[:1], **options)


def test_the_most_probable_token_exists() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 9.0]])
    tokens, logprobs = choose(logits, Sampling(num_ids=3), None)
    assert tokens.tolist() == [1], "of equal ones the first"
    assert logprobs.tolist() == pytest.approx([torch.log_softmax(logits[0, :3], -1)[1].item()])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "num_threads"), [*((kind, 1) for kind in CONFIGS), ("long", 1), ("long", 2)])
def test_a_constant_batch_knows_no_neighbours(kind: str, num_threads: int, long_model: LlamaForCausalLM) -> None:
    lm = long_model if kind == "long" else make_root(kind, torch.float32, probe=False).lm
    generator, stops = np.random.default_rng(0), range(0, VOCABULARY, 8)

    def some(*lengths: int) -> list[list[int]]:
        return [generator.integers(0, VOCABULARY, length).tolist() for length in lengths]

    def sample(some: list[list[int]], seeds: list[int], batch_size: int = 4) -> list[Completion]:
        return generate(lm, some, max_new_tokens=9, stop_ids=stops, pad_id=PAD, temperature=1.0, seeds=seeds,
                        batch_size=batch_size, constant_batch=True)

    mine, seeds = some(3, 20, WIDTH, WIDTH + 2, 2 * WIDTH, 20), [7, 8, 9, 10, 11, 12]
    with threads(num_threads):
        alone = [sample([prompt], [seed])[0] for prompt, seed in zip(mine, seeds, strict=True)]
        for lengths in [(), (5, 7), (WIDTH, 1, WIDTH), (63, 62, 61, 60, 3, 2, 1, 100, 101), (20,) * 7 + (WIDTH,) * 6]:
            every, every_seed = mine + some(*lengths), seeds + list(range(len(lengths)))
            order = generator.permutation(len(every)).tolist()
            made = sample([every[place] for place in order], [every_seed[place] for place in order])
            assert [made[order.index(place)] for place in range(len(mine))] == alone, lengths
        for prompt in mine:  # every place of a batch whose size is no multiple of what the kernels take at once
            same = sample([prompt] * 6, [7] * 6, batch_size=6)
            assert same == [same[0]] * 6
    assert {answer.stopped for answer in alone} == {True, False}
    plain = generate(lm, mine, max_new_tokens=9, stop_ids=stops, pad_id=PAD, temperature=1.0, seeds=seeds)
    assert all(close(one, other) for one, other in zip(plain, alone, strict=True))


def test_the_shapes_of_a_constant_batch(long_model: LlamaForCausalLM) -> None:
    def shapes(some: list[list[int]], stop_ids: list[int], max_new_tokens: int = 4) -> list[tuple[int, ...]]:
        with calls_of(long_model) as calls:
            answers = generate(long_model, some, max_new_tokens=max_new_tokens, stop_ids=stop_ids, pad_id=PAD,
                               temperature=1.0, batch_size=4, constant_batch=True)
        assert len(answers) == len(some)
        return [tuple(call["input_ids"].shape) for call in calls]

    decoded = [(4, 1)] * 3
    assert shapes([[1]], []) == shapes([[1]] * 4, []) == shapes([[1] * 64, ], []) == [(4, 64), *decoded]
    assert shapes([[1] * 5, [2] * 7, [3] * 63], []) == [(4, 64), *decoded]
    assert shapes([[1] * 5, [2] * 65, [3] * 64], []) == [(4, 64), *decoded, (4, 64), *decoded, (4, 128), *decoded]
    assert shapes([[1]] * 5, []) == [(4, 64), *decoded] * 2
    assert shapes([[1] * 200, [1] * 252], []) == [(4, 252), *decoded, (4, 252), *decoded], "the model's limit is 256"
    assert shapes([[1] * 3], [], max_new_tokens=250) == [(4, 6), *[(4, 1)] * 249]
    with calls_of(long_model) as calls:
        generate(long_model, [[1]] * 9, max_new_tokens=1, stop_ids=[], pad_id=PAD, batch_size=6, constant_batch=True)
    assert [tuple(call["input_ids"].shape) for call in calls] == [(8, 64)] * 2, "rows are rounded up to a multiple of 4"
    assert shapes([[1], [2]], list(range(VOCABULARY))) == [(4, 64)], "nothing is decoded when all have stopped"
    few = shapes([[1], [2], [3], [4]], list(range(0, VOCABULARY, 2)), 40)
    assert 2 < len(few) < 40 and set(few[1:]) == {(4, 1)}, "rows that have stopped stay, until all have"


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
        tokens, _ = choose(logits.expand(1000, -1), sampling, drawn)
        assert (tokens.diff() >= 0).all(), "in the order of the vocabulary"
        return (torch.bincount(tokens, minlength=4) / 1000).tolist()

    assert shares(Sampling(1.0)) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=0.002)
    assert shares(Sampling(0.5)) == pytest.approx([p ** 2 / 0.345 for p in (0.5, 0.25, 0.15, 0.1)], abs=0.002)
    assert shares(Sampling(1.0, top_k=2)) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.002)
    assert shares(Sampling(1.0, top_p=0.5)) == pytest.approx([1, 0, 0, 0])
    assert shares(Sampling(1.0, top_p=0.6)) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.002)
    assert shares(Sampling(1.0, top_k=3, top_p=0.95)) == pytest.approx([5 / 9, 2.5 / 9, 1.5 / 9, 0], abs=0.002)
    assert shares(Sampling(0.0)) == [1, 0, 0, 0]
    assert shares(Sampling(1e-40)) == [1, 0, 0, 0]
    assert shares(Sampling(1.0, num_ids=2)) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.002)
    ends, _ = choose(logits.expand(2, -1), Sampling(1.0, top_k=2), np.array([0.0, np.nextafter(1.0, 0)]))
    assert ends.tolist() == [0, 1]


@pytest.mark.parametrize("vocabulary", [1, 3, 255, 256, 257, 5000])
def test_a_draw_inverts_the_distribution_function(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(400, vocabulary, generator=generator) * 4
    logits[:, ::3] = -torch.inf if vocabulary > 3 else 0.0
    drawn = np.random.default_rng(0).random(400)
    drawn[:2] = 0.0, np.nextafter(1.0, 0)
    tokens, logprobs = choose(logits, Sampling(1.0), drawn)
    exact = torch.softmax(logits.double(), -1)
    after = exact.cumsum(-1).gather(1, tokens[:, None])[:, 0].numpy()
    weight = exact.gather(1, tokens[:, None])[:, 0].numpy()
    assert (weight > 0).all()
    assert (after - weight <= drawn + 2e-6).all() and (drawn <= after + 2e-6).all()
    assert np.allclose(logprobs.numpy(), np.log(weight), rtol=0, atol=1e-5)


def test_what_a_broken_model_says_breaks_nothing_else() -> None:
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0))
    logits[1] = torch.nan
    for sampling in (Sampling(), Sampling(1.0), Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.5)):
        drawn = np.full(3, 0.5)
        tokens, logprobs = choose(logits, sampling, drawn)
        well, expected = choose(logits[[0, 2]], sampling, drawn[:2])
        assert tokens[[0, 2]].tolist() == well.tolist() and logprobs[[0, 2]].tolist() == expected.tolist()
        assert 0 <= tokens[1] < 3000 and logprobs[1].isnan()


def test_no_block_changes_the_odds_of_its_ids() -> None:
    """Rounding must not make the last id of a block, however improbable, the one that takes what is left over."""
    probs = np.random.default_rng(0).random(2 ** 10)
    probs[255::256] = 1e-12
    logits = torch.tensor(np.log(probs))[None].float()
    exact = torch.softmax(logits.double(), -1)[0].numpy()
    borders = exact.cumsum()[255:-1:256]
    drawn = (borders[:, None] + np.linspace(-3e-7, 3e-7, 400)).ravel()
    tokens, _ = choose(logits.expand(len(drawn), -1), Sampling(1.0), drawn)
    assert not set(tokens.tolist()) & {255, 511, 767}


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.3, top_k=7), Sampling(1.0, top_p=0.9),
                                      Sampling(0.5, top_k=40, top_p=0.6), Sampling(2.0, top_p=0.3),
                                      Sampling(1.0, top_k=10 ** 6)], ids=str)
def test_cutting_off_is_as_in_transformers(sampling: Sampling, scale: float) -> None:
    logits = torch.randn(20, 3000, generator=torch.Generator().manual_seed(0)) * scale
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    expected = torch.softmax(warpers(torch.empty(20, 0), logits), -1)
    scores = logits / sampling.temperature
    found = cut_off(torch.softmax(scores, -1), scores, sampling)
    assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found / found.sum(-1, keepdim=True), expected, rtol=1e-4, atol=1e-9)


def test_a_nucleus_among_equals_is_no_larger_than_needed() -> None:
    kept = cut_off(torch.full((2, 4000), 1 / 4000), torch.zeros(2, 4000), Sampling(1.0, top_p=0.1))
    assert (kept > 0).sum(-1).tolist() == [400, 400] and (kept[:, :400] > 0).all()


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"num_ids": 0}])
def test_impossible_sampling_is_refused(model: LlamaForCausalLM, wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match="cannot be meant"):
        generate(model, [[1]], max_new_tokens=1, stop_ids=[], pad_id=PAD, **wrong)


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
        tokens.close()
        assert model.training and not model.model.layers[0].training
        assert model.config._attn_implementation == attention.NAME
        model.set_attn_implementation("eager")
        with use_plain_attention(model):
            assert model.config._attn_implementation == "eager"
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        model.set_attn_implementation("sdpa")
        model.eval()
