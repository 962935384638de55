"""Limits of the whole and of each side: what stays, what goes, and that every token is accounted for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Dialogue, Message
from danlu.tokens.encode import Encoder
from danlu.tokens.limits import split_turns
from tokens.samples import make_words, talk

# <s> [system] 50 question 51 answer </s> 50 …; every word is a token
WORDS = ("{{ '<s>' }}{% for m in messages %}{{ {'system': ' 40 ', 'user': ' 50 ', 'assistant': ' 51 '}[m['role']] + "
         "m['content'] + (' </s>' if m['role'] == 'assistant' else '') }}{% endfor %}"
         "{% if add_generation_prompt %}{{ ' 51' }}{% endif %}")


def dialogue(*contents, system=None):
    return Dialogue(talk(*contents, system=system), "f", "f:1")


def encode(cutoff_len, *contents, system=None, **settings):
    """[(tokens, learned tokens)] and the ledger, which balances."""
    encoder, ledger = Encoder(make_words(WORDS), cutoff_len, **settings), Ledger()
    found = [(x.branches[0].tokens.tolist(), x.branches[0].tokens[x.branches[0].weights > 0].tolist())
             for x in encoder.dialogue(dialogue(*contents, system=system), ledger)]
    ledger.check()
    return found, ledger


TALK = ("60 61", "70 71", "62", "72", "63", "73")  # 1 + (6, 4, 4) tokens with the marks and ends


def test_the_whole_row():
    [(tokens, learned)], ledger = encode(99, *TALK)
    assert tokens == [1, 50, 60, 61, 51, 70, 71, 2, 50, 62, 51, 72, 2, 50, 63, 51, 73, 2]
    assert learned == [70, 71, 2, 72, 2, 73, 2]
    assert ledger.stations["overlong"].came.rows == 0


@pytest.mark.parametrize(("settings", "expected"), [
    ({"overlong": "turns"}, [[1, 40, 9, 50, 60, 61, 51, 70, 71, 2]]),
    ({"overlong": "turns", "truncation_mode": "keep_end"}, [[1, 40, 9, 50, 62, 51, 72, 2, 50, 63, 51, 73, 2]]),
    ({"overlong": "turns", "learn": "last"}, [[1, 40, 9, 50, 62, 51, 72, 2, 50, 63, 51, 73, 2]]),
    ({"overlong": "tokens"}, [[1, 40, 9, 50, 60, 61, 51, 70, 71, 2, 50, 62, 51, 72]]),
    ({"overlong": "tokens", "truncation_mode": "keep_end"}, [[51, 70, 71, 2, 50, 62, 51, 72, 2, 50, 63, 51, 73, 2]]),
    ({"overlong": "split"}, [[1, 40, 9, 50, 60, 61, 51, 70, 71, 2], [1, 40, 9, 50, 62, 51, 72, 2, 50, 63, 51, 73, 2]]),
    ({"overlong": "drop"}, []),
])
def test_what_stays_of_a_long_dialogue(settings, expected):
    found, ledger = encode(14, *TALK, system="9", **settings)
    assert [tokens for tokens, _ in found] == expected
    station = ledger.stations["overlong"]
    assert station.came.tokens == 20 and station.went.tokens == sum(map(len, expected))


def test_the_last_answer_is_learned_and_not_the_last_that_fits():
    [(_, learned)], _ = encode(14, *TALK, learn="last")
    assert learned == [73, 2]


@pytest.mark.parametrize(("settings", "expected", "reason"), [
    ({"max_source_length": 4, "overlong": "drop"}, [], "longer than max_source_length"),
    ({"max_target_length": 2, "overlong": "drop"}, [], "longer than max_target_length"),
    ({"max_source_length": 4, "overlong": "tokens"},
     [[1, 50, 60, 51, 70, 71, 2, 50, 62, 51, 72, 2, 50, 63, 51, 73, 2]], None),
    ({"max_source_length": 4, "overlong": "tokens", "truncation_mode": "keep_end"},
     [[1, 50, 61, 51, 70, 71, 2, 50, 62, 51, 72, 2, 50, 63, 51, 73, 2]], None),
    ({"max_target_length": 2, "overlong": "tokens"},
     [[1, 50, 60, 61, 51, 70, 71, 50, 62, 51, 72, 2, 50, 63, 51, 73, 2]], None),
    ({"max_source_length": 2, "overlong": "tokens"}, [], "the template fills max_source_length"),
    ({"max_source_length": 4, "overlong": "turns"}, [], "no turn fits max_source_length"),
    ({"max_source_length": 4, "overlong": "turns", "truncation_mode": "keep_end"},
     [[1, 50, 62, 51, 72, 2, 50, 63, 51, 73, 2]], "turns beyond max_source_length"),
    ({"max_target_length": 2, "overlong": "split"}, [[1, 50, 62, 51, 72, 2, 50, 63, 51, 73, 2]],
     "turns longer than max_target_length"),
])
def test_each_side_has_a_limit_of_its_own(settings, expected, reason):
    found, ledger = encode(99, *TALK, **settings)
    assert [tokens for tokens, _ in found] == expected
    if reason:
        assert reason in ledger.stations["overlong"].dropped


def test_sides_within_their_limits_are_left_alone():
    [(tokens, _)], ledger = encode(99, *TALK, max_source_length=5, max_target_length=3)
    assert len(tokens) == 18 and ledger.stations["overlong"].came.rows == 0


def test_error_names_the_row_and_the_limit():
    with pytest.raises(DataError, match=r"(?s)f:1: .*exceeds max_target_length.*Raise max_target_length"):
        encode(99, *TALK, max_target_length=2, overlong="error")


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=8).map(lambda x: x[:len(x) // 2 * 2]),
       cutoff=st.integers(4, 30), overlong=st.sampled_from(["turns", "tokens", "split", "drop"]),
       mode=st.sampled_from(["keep_start", "keep_end"]), source=st.none() | st.integers(1, 8),
       target=st.none() | st.integers(2, 6), learn=st.sampled_from(["assistant", "last", "all"]), system=st.booleans())
def test_limits_hold_and_the_ledger_balances(lengths, cutoff, overlong, mode, source, target, learn, system):
    contents = [" ".join(str(100 + 10 * i + k) for k in range(n)) for i, n in enumerate(lengths)]
    found, _ = encode(cutoff, *contents, system="9" if system else None, overlong=overlong, truncation_mode=mode,
                      max_source_length=source, max_target_length=target, learn=learn)
    for tokens, learned in found:
        assert len(tokens) <= cutoff and learned
        run = 0
        for token in tokens:
            run = run + 1 if (100 <= token < 200 and (token - 100) // 10 % 2 == 1) or (token == 2 and run) else 0
            assert target is None or learn == "last" or run <= target  # of the last, all before it is its source


def test_calls_of_tools_stay_with_what_follows():
    messages = [Message("system", "s"), Message("user", "a"), Message("assistant", ""), Message("tool", "r"),
                Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
    head, turns = split_turns(messages)
    assert head == messages[:1]
    assert turns == [messages[1:5], messages[5:]]


def test_a_source_without_its_first_token_balances():
    """A template that begins with what was said loses its first token to `keep_end`; the next is not learned."""
    template = "{% for m in messages %}{{ ' ' + m['content'] + (' </s>' if m['role'] == 'assistant' else '') }}{% endfor %}"
    encoder, ledger = Encoder(make_words(template), 99, "tokens", learn="all", truncation_mode="keep_end",
                              max_source_length=1), Ledger()
    [example] = encoder.dialogue(dialogue("60 61 62", "70 71"), ledger)
    assert example.branches[0].tokens.tolist() == [62, 70, 71, 2]
    assert example.branches[0].weights.tolist() == [0, 1, 1, 1]
    ledger.check()
