"""Multiple choice and clozes by likelihood: the numbers of a direct computation, and what is made of them by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_chat import POSITIONS, TEXTS, filled, tiny_loaded

from danlu.core.errors import DataError
from danlu.evals.choices import Item
from danlu.evals.likelihood import ItemScore, choice_row, encode_item, prefix_of, score_items
from danlu.models.generate import generate
from danlu.tokens.codec import Codec

QUESTION = Item(("The quick brown",), (" fox", " dog jumps", " cat"), 0, "s", "q")
ENDINGS = Item(("春眠不觉晓，", "夜来风雨声，处处"), ("花落知多少",), 1, "s", "e")
CLOZE = Item(("The lazy",), (" dog",), 0, "s", "c", cloze=True)
ITEMS = [QUESTION, ENDINGS, CLOZE, Item(("红楼梦 三国演义 ",), ("水浒传", "西游记"), 1, "s", "z")]


def directly(context: str, continuation: str) -> tuple[float, bool]:
    """Σ log p of the continuation's tokens with transformers alone, and whether each is the most probable one."""
    loaded = tiny_loaded()
    before = loaded.tokenizer.encode(context, add_special_tokens=False)
    ids = [loaded.tokenizer.bos_token_id, *loaded.tokenizer.encode(context + continuation, add_special_tokens=False)]
    loaded.lm.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            logprobs = torch.log_softmax(loaded.lm(torch.tensor([ids])).logits[0].double(), -1)[len(before):-1]
    finally:
        loaded.lm.set_attn_implementation("danlu")
    targets = torch.tensor(ids[len(before) + 1:])
    return float(logprobs.gather(1, targets[:, None]).sum()), bool((logprobs.argmax(-1) == targets).all())


@pytest.mark.parametrize("num_shots", [0, 2])
def test_sums_are_those_of_transformers(num_shots: int) -> None:
    loaded = tiny_loaded()
    shots = [Item(("A dog",), (" jumps", " sleeps"), 0, "s", "1"), Item(("A fox",), (" jumps", " is"), 1, "s", "2")]
    found = score_items(loaded.root, loaded.tokenizer, ITEMS, shots=shots, num_shots=num_shots, limit=POSITIONS)
    prefix = "A dog jumps\n\nA fox is\n\n" if num_shots else ""
    for place, item in enumerate(ITEMS):
        expected = [directly(prefix + context, continuation) for context, continuation in
                    (item.pair(choice) for choice in range(item.num_choices))]
        assert found[place].sums == pytest.approx([total for total, _ in expected], rel=1e-5)
        right = expected[0][1] if item.cloze else int(np.argmax([total for total, _ in expected])) == item.gold
        assert found[place].right == right


def test_micro_batches_and_padding_change_nothing() -> None:
    loaded = tiny_loaded()
    whole = score_items(loaded.root, loaded.tokenizer, ITEMS)
    heard: list[int] = []
    small = score_items(loaded.root, loaded.tokenizer, ITEMS, micro_batch_tokens=16, progress=heard.append)
    loaded.root.packs = False
    loaded.lm.set_attn_implementation("sdpa")
    try:
        padded = score_items(loaded.root, loaded.tokenizer, ITEMS)
    finally:
        loaded.root.packs = True
        loaded.lm.set_attn_implementation("danlu")
    for other in (small, padded):
        assert [other[place].sums for place in whole] == [pytest.approx(whole[place].sums, rel=1e-5) for place in whole]
    assert heard[-1] == len(ITEMS) and len(heard) > 1


def test_the_shared_prompt_is_computed_once() -> None:
    codec = Codec(tiny_loaded().tokenizer)
    prefix = "The quick brown fox jumps over the lazy dog. "
    made = encode_item(codec, QUESTION, prefix, 1, None)
    assert made is not None
    example, cut = made
    [context] = codec.encode_plain([prefix + QUESTION.contexts[0]])
    assert cut == 0 and example.stem.tolist() == [1, *context.tolist()]
    for branch, text in zip(example.branches, QUESTION.continuations, strict=True):
        assert codec.decode(branch.tokens) == text and branch.weights.tolist() == [1] * len(branch.tokens)
    ends = encode_item(codec, ENDINGS, "", 1, None)
    assert ends is not None and ends[0].stem.tolist() == [1], "contexts that differ are in the branches"
    assert [int(branch.weights.sum()) for branch in ends[0].branches] == [len(codec.encode_plain(["花落知多少"])[0])] * 2


def test_a_cloze_is_right_where_greedy_decoding_gives_it() -> None:
    loaded = tiny_loaded()
    codec, contexts = Codec(loaded.tokenizer), [word for text in TEXTS for word in text.split()]
    prompts = [[loaded.tokenizer.bos_token_id, *ids.tolist()] for ids in codec.encode_plain(contexts)]
    made = generate(loaded.lm, prompts, max_new_tokens=2, stop_ids=[], pad_id=0, num_ids=len(loaded.tokenizer))
    # of what was said, something whose text has the tokens that were said
    context, text, said = next((context, text, said) for context, prompt, said in zip(contexts, prompts, made, strict=True)
                               for text in (codec.decode(said.tokens),) if text.strip()
                               and codec.encode_plain([context + text])[0].tolist() == [*prompt[1:], *said.tokens])
    right = replace(CLOZE, contexts=(context,), continuations=(text,))
    found = score_items(loaded.root, loaded.tokenizer, [right, replace(right, continuations=(" dog",))])
    assert found[0].right and not found[1].right and found[0].norm_right is None
    longer = replace(right, continuations=(f"{text} dog",))
    assert not score_items(loaded.root, loaded.tokenizer, [longer])[0].right, "every token has to be the most probable one"
    assert found[0].sums[0] == pytest.approx(sum(said.logprobs), rel=1e-4)


def test_by_hand_a_model_that_knows_nothing_prefers_few_tokens_and_tokens_of_many_bytes() -> None:
    loaded = tiny_loaded()
    weight = loaded.lm.get_output_embeddings().weight
    with filled(weight, 0.0):
        codec, price = Codec(loaded.tokenizer), math.log(len(weight))
        item = Item(("dog.",), (" q", " The quick brown fox"), 0, "s", "h")
        [found] = score_items(loaded.root, loaded.tokenizer, [item]).values()
    counts = [len(codec.encode_plain([text])[0]) for text in item.continuations]
    assert found.sums == pytest.approx([-price * count for count in counts])
    assert counts[0] < counts[1] and counts[0] / len("q") > counts[1] / len("The quick brown fox")
    assert found.right and found.norm_right is False, "the sum prefers the short answer, the mean per byte the long one"


def test_acc_norm_divides_by_bytes_and_not_by_characters() -> None:
    loaded = tiny_loaded()
    weight = loaded.lm.get_output_embeddings().weight
    with filled(weight, 0.0):
        item = Item(("dog.",), ("，。", " abcdefgh"), 0, "s", "b")
        [found] = score_items(loaded.root, loaded.tokenizer, [item]).values()
    one, other = (-total / math.log(len(weight)) for total in found.sums)  # numbers of tokens
    assert one / 6 < other / 8 < one / 2, "by bytes the first is cheaper, by characters the second would be"
    assert found.norm_right


def test_prompts_that_are_too_long_lose_their_beginning_and_not_the_first_token() -> None:
    loaded = tiny_loaded()
    codec, begin = Codec(loaded.tokenizer), loaded.tokenizer.bos_token_id
    long = "The quick brown fox jumps over the lazy dog. " * 4
    made = encode_item(codec, QUESTION, long, begin, 40)
    assert made is not None
    example, cut = made
    longest = len(example.stem) + max(len(branch.tokens) for branch in example.branches)
    assert longest == 40 and cut > 0 and example.stem[0] == begin
    assert codec.decode(example.stem[1:]).endswith(" quick brown") and long.endswith("dog. ")
    shots = [Item((long * 3,), ("x",), 0, "s", "1")]
    found = score_items(loaded.root, loaded.tokenizer, [QUESTION], shots=shots, num_shots=1, limit=POSITIONS)
    assert found[0].cut > 0
    endless = replace(QUESTION, continuations=(" fox", " dog" * 100))
    assert encode_item(codec, endless, "", begin, 40) is None, "an answer that does not fit cannot be asked"
    assert encode_item(codec, replace(QUESTION, contexts=("",)), "", None, None) is None, "nothing predicts a first token"


def test_examples_are_of_the_same_subject_and_the_description_names_it() -> None:
    shots = [Item((f"{subject} {number}",), (" yes", " no"), 1, subject, "1")
             for subject in ("law", "art") for number in (1, 2, 3)]
    item = replace(QUESTION, subject="art")
    assert prefix_of(item, shots, 2) == "art 1 no\n\nart 2 no\n\n"
    assert prefix_of(replace(item, subject="high_school_art"), shots, 1, "About {subject}.") == \
        "About high school art.\n\nlaw 1 no\n\n"
    assert prefix_of(item, shots, 0) == ""


def test_rows_by_hand() -> None:
    items = [replace(QUESTION, gold=gold) for gold in (0, 0, 1, 2)]
    found = {place: ItemScore((-1.0, -2.0, -3.0), right, True) for place, right in enumerate((True, True, False, True))}
    before = {place: replace(score, right=place == 0) for place, score in found.items()}
    row = choice_row("b", "m", 5, items, found, before)
    assert (row.acc, row.acc_norm, row.num_items, row.chance, row.gain) == (0.75, 1.0, 4, pytest.approx(1 / 3), 0.5)
    assert row.low == pytest.approx(0.3006, abs=1e-4) and row.high == pytest.approx(0.9544, abs=1e-4), "Wilson, 3 of 4"
    assert row.gain_low is not None and 0.0 <= row.gain_low < 0.5 < row.gain_high <= 1.0  # type: ignore[operator]  # both or neither
    clozes = choice_row("c", "m", 0, [CLOZE, CLOZE], {0: ItemScore((-math.log(2),), True, None),
                                                      1: ItemScore((-math.log(8),), False, None)})
    assert clozes.perplexity == pytest.approx(4.0) and clozes.acc_norm is None and clozes.chance is None
    assert clozes.gain is None


def test_numbers_that_are_not_finite_are_no_result() -> None:
    loaded = tiny_loaded()
    weight = loaded.lm.model.norm.weight
    with filled(weight, math.nan), pytest.raises(DataError, match="q: the model gives an answer no probability"):
        score_items(loaded.root, loaded.tokenizer, [QUESTION])
