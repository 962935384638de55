"""How much of a dialogue is learned: weights of messages and of their parts, and one row for each answer."""

import numpy as np
import pytest

from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Dialogue, Message
from danlu.tokens.encode import Encoder
from tokens.samples import CHATML, END_AT_LAST, THINKING, dialogue, learned_text, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tokenizer"))


def weighted(*answers):
    messages = []
    for number, (content, weight) in enumerate(answers):
        messages += [Message("user", f"q{number}"), Message("assistant", content, weight=weight)]
    return Dialogue(tuple(messages), "f", "f:1")


def weights_of(encoder, dialogue):
    """Each run of learned tokens as text with its weight."""
    [example] = encoder.dialogue(dialogue, Ledger())
    branch = example.branches[0]
    found = []
    for weight in sorted(set(branch.weights.tolist()) - {0.0}):
        found.append((weight, encoder.codec.decode(branch.tokens[branch.weights == np.float32(weight)])))
    return found


def test_messages_say_how_much_they_are_learned(folder):
    talked = weighted(("one", 0.0), ("two", None), ("three", 0.5), ("four", 2.0))
    tokenizer = make_tokenizer(folder, CHATML, "<|im_end|>")
    assert weights_of(Encoder(tokenizer, 400), talked) == [
        (0.5, "three<|im_end|>"), (1.0, "two<|im_end|>"), (2.0, "four<|im_end|>")]
    assert weights_of(Encoder(tokenizer, 400, learn="last"), talked) == [(2.0, "four<|im_end|>")]
    everything = dict(weights_of(Encoder(tokenizer, 400, learn="all"), talked))
    assert set(everything) == {0.5, 1.0, 2.0}
    assert "q0" in everything[1.0] and "one" not in everything[1.0]


def test_a_dialogue_without_a_learned_answer_is_counted(folder):
    for template in (CHATML, THINKING):
        encoder, ledger = Encoder(make_tokenizer(folder, template, "<|im_end|>"), 400), Ledger()
        assert encoder.dialogue(weighted(("one", 0.0), ("two", 0.0)), ledger) == []
        ledger.check()
        dropped = ledger.stations["render"].dropped | ledger.stations["learn"].dropped
        assert set(dropped) & {"nothing to learn", "no answer has a weight"}


def test_each_answer_is_learned_as_it_was_given_where_the_template_rewrites_history(folder):
    encoder, ledger = Encoder(make_tokenizer(folder, THINKING, "<|im_end|>"), 400), Ledger()
    found = list(encoder.dialogues([weighted(("one", None), ("two", 0.0), ("three", 0.5))], ledger))
    assert [x.id for x in found] == ["f:1", "f:1#2"]
    assert learned_text(encoder, found) == [f"<think>\n\n</think>\n\n{word}<|im_end|>" for word in ("one", "three")]
    assert found[1].branches[0].weights.max() == 0.5
    station = ledger.stations["render"]
    assert (station.came.rows, station.went.rows) == (1, 2)
    ledger.check()
    with pytest.raises(DataError, match=r"(?s)f:1: .*otherwise than they were said.*per_turn"):
        Encoder(make_tokenizer(folder, THINKING, "<|im_end|>"), 400, rewritten_history="error").dialogue(
            weighted(("one", None), ("two", None)), Ledger())


def test_a_long_row_of_one_answer_loses_its_oldest_turns(folder):
    encoder, ledger = Encoder(make_tokenizer(folder, THINKING, "<|im_end|>"), 45), Ledger()
    found = list(encoder.dialogues([weighted(("x" * 20, None), ("two", None))], ledger))
    assert learned_text(encoder, found)[-1] == "<think>\n\n</think>\n\ntwo<|im_end|>"
    assert "x" not in encoder.codec.decode(found[-1].branches[0].tokens)
    ledger.check()


def test_an_end_in_the_middle_is_learned_in_a_row_of_its_own(folder):
    encoder = Encoder(make_tokenizer(folder, END_AT_LAST, "</s>"), 400)
    assert learned_text(encoder, encoder.dialogue(dialogue("Hi?", "Hello.", "More?", "Enough."), Ledger())) == [
        "Hello.</s>", "Enough.</s>"]


def test_roles_ignore_case(folder):
    encoder = Encoder(make_tokenizer(folder, CHATML, "<|im_end|>"), 400)
    shouted = Dialogue((Message("SYSTEM", "s"), Message("User", "a"), Message("Assistant", "b")), "f", "f:1")
    assert learned_text(encoder, encoder.dialogue(shouted, Ledger())) == ["b<|im_end|>"]


@pytest.mark.parametrize("overlong", ["turns", "tokens", "split", "drop"])
def test_a_long_row_of_everything_is_shortened_where_history_is_rewritten(folder, overlong):
    encoder, ledger = Encoder(make_tokenizer(folder, THINKING, "<|im_end|>"), 45, overlong, learn="all"), Ledger()
    found = list(encoder.dialogues([weighted(("x" * 20, None), ("two", None))], ledger))
    assert bool(found) == (overlong != "drop")
    assert all(x.num_tokens <= 45 for x in found)
    ledger.check()


@pytest.mark.parametrize(("weight", "rows"), [(None, 1), (1.0, 1), (0.0, 0), (0.5, 0)])
def test_a_weight_that_a_rewritten_history_would_lose_costs_the_row(folder, weight, rows):
    encoder, ledger = Encoder(make_tokenizer(folder, THINKING, "<|im_end|>"), 400, learn="all"), Ledger()
    assert len(list(encoder.dialogues([weighted(("one", weight), ("two", 0.5))], ledger))) == rows
    ledger.check()
    assert ledger.num_quarantined == 1 - rows
    assert [count.rows for reason, count in ledger.stations["render"].dropped.items()
            if reason == "an earlier answer has a weight, and the template rewrites it"] == [1] * (1 - rows)


def test_parts_of_an_answer_have_weights(folder):
    """A masked part, a part that counts half, thinking before them, and the end of the turn, which is always learned."""
    tokenizer = make_tokenizer(folder, CHATML, "<|im_end|>")
    said = "  Wrong step. Right step."
    answer = Message("assistant", said, thinking="hm", spans=((2, 13, 0.0), (19, 25, 0.5)))
    for learn, after in (("assistant", ""), ("all", "\n")):
        encoder, ledger = Encoder(tokenizer, 400, learn=learn), Ledger()
        [example] = encoder.dialogue(Dialogue((Message("user", "a"), answer), "f", "f:1"), ledger)
        branch = example.branches[0]
        got = {weight: encoder.codec.decode(branch.tokens[1:][branch.weights[1:] == weight]) for weight in (0, 0.5, 1)}
        assert got[0.5] == " step." and "Wrong step." in got[0] and "Wrong" not in got[1]
        assert got[1].endswith(" Right<|im_end|>" + after)
        assert "<think>\nhm\n</think>" in got[1]
        ledger.check()
    rewrites = CHATML.replace("message['content'] +", "message['content'] | replace('Wrong', 'No') +")
    encoder, ledger = Encoder(make_tokenizer(folder, rewrites, "<|im_end|>"), 400), Ledger()
    assert encoder.dialogue(Dialogue((Message("user", "a"), answer), "f", "f:1"), ledger) == []
    assert "rewrites an answer of which parts have weights" in ledger.quarantined[0].reason
    ledger.check()
